"""`shoal simulate`: scenarios, and whole swarms with everything going wrong."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from shoal.base.errors import ConfigError
from shoal.cli.logs import progress_bar
from shoal.cli.simulate_replay import replay
from shoal.cli.simulate_run import run

if TYPE_CHECKING:
    from shoal.lab.campaign import Failure

ERROR_LINES_MAX: Final = 30
"""Lines of a failure's text that are shown: a stuck run lists all of its tasks."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        cls=_ScenarioGroup, no_args_is_help=True, rich_markup_mode=None,
        help="Simulate scenarios, and run whole swarms on virtual time.",
    )  # fmt: skip
    group.callback()(_group)
    group.command("run")(run)
    group.command("chaos")(chaos)
    group.command("replay")(replay)
    app.add_typer(group, name="simulate")


def _group() -> None:
    """Simulate scenarios, and run whole swarms on virtual time.

    `shoal simulate SCENARIO.toml` is `shoal simulate run SCENARIO.toml`.
    """


class _ScenarioGroup(TyperGroup):
    """A group whose first word may be a file instead of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What is a file and no command is run."""
        is_file = bool(args) and (args[0].endswith(".toml") or Path(args[0]).is_file())
        if is_file and args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


def chaos(
    seeds: Annotated[int, typer.Option(metavar="N", min=1, help="How many schedules.")] = 100,
    first: Annotated[int, typer.Option(metavar="S", min=0, help="The first seed.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(metavar="J", min=1, help="Processes (default: one per core; 1 with --debug)."),
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --seeds 1: the servers' traces go here, for `replay`."
        ),
    ] = None,
) -> None:
    """Run random schedules of failures; every answer must still be right.

    Each seed draws a small swarm, its links, its users and what goes wrong: crashes,
    stopped processes, cut links, lost frames, full caches. The real client and server
    run on virtual time with toy blocks that prove which rows they were given. A seed
    that fails is shown with the command that repeats it and the smallest schedule that
    still fails. The last line on stdout sums up; the exit code is 1 if any seed failed.

    \b
    Example:
      shoal simulate chaos --seeds 1000
      shoal --debug simulate chaos --first 7 --seeds 1         (with its whole log)
    """
    from shoal.lab.campaign import quiet, run_seed, run_seeds, traces_in

    if traces is not None and seeds != 1:
        raise ConfigError("--traces takes one schedule: give --seeds 1 too")
    is_debugging = logging.getLogger("shoal").getEffectiveLevel() <= logging.DEBUG
    jobs = min(seeds, jobs or (1 if is_debugging else os.cpu_count() or 1))
    rows = repairs = failures = done = 0
    with nullcontext() if is_debugging else quiet(), progress_bar() as progress:
        outcomes = run_seeds(range(first, first + seeds), jobs=jobs)
        if traces is not None:
            outcomes = iter([run_seed(first, record=traces_in(traces))])
        for outcome in outcomes:
            done += 1
            progress(f"schedules, {failures} failed", done, seeds)
            if outcome.result is not None:
                rows += outcome.result.checked_rows
                repairs += outcome.result.recoveries
            if outcome.failure is not None:
                failures += 1
                _show(outcome.failure)
    print(
        f"{seeds} schedules, {rows} rows checked, {repairs} repairs, {failures} failures",
        flush=True,
    )
    if failures:
        raise typer.Exit(1)


def _show(failure: Failure) -> None:
    lines = [
        f"seed {failure.seed} failed: {_head(failure.error)}",
        f"repeat it with: shoal simulate chaos --first {failure.seed} --seeds 1",
        f"shrunk: {failure.shrunk}",
    ]
    if failure.shrunk_error != failure.error:
        lines.append(f"which fails with: {_head(failure.shrunk_error)}")
    print("\n".join(lines), file=sys.stderr, flush=True)


def _head(text: str) -> str:
    lines = text.splitlines()
    if len(lines) <= ERROR_LINES_MAX:
        return text
    rest = len(lines) - ERROR_LINES_MAX
    return "\n".join([*lines[:ERROR_LINES_MAX], f"  ... ({rest} more lines)"])
