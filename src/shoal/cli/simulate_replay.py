"""`shoal simulate replay`: an incident that servers recorded, again on virtual time."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.logs import progress_bar

if TYPE_CHECKING:
    from shoal.lab.trace_past import Incident
    from shoal.lab.trace_replay import Replay


def replay(
    traces: Annotated[
        list[Path], typer.Argument(metavar="TRACE...", help="Traces of the incident's servers.")
    ],
    seed: Annotated[
        int, typer.Option(metavar="S", min=0, help="0: as even as can be; others differ a little.")
    ] = 0,
    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Play so many seeds, from --seed on.")
    ] = 1,
    start: Annotated[
        float, typer.Option("--from", metavar="S", min=0, help="Take what happened from here on.")
    ] = 0.0,
    end: Annotated[
        float | None, typer.Option("--to", metavar="S", min=0, help="And up to here.")
    ] = None,
) -> None:
    """Play an incident again: the real code on virtual time, as the traces tell it.

    Servers write traces with `shoal serve --trace FILE`. Give those of as many of the
    incident's servers as there are (FILE.1 too); servers without a trace are known from the
    others' routes. In the lab servers come and go when they did and sessions send as many rows
    when they did, with made-up contents that are checked. What happened is shown beside what
    happens in the lab; the same files and seed give the same run. The last line on stdout sums
    up; the exit code is 1 if the lab finds a bug: a wrong row, books that don't agree,
    something that stands still.

    \b
    Example:
      shoal simulate replay a.trace b.trace c.trace
      shoal simulate replay *.trace --seeds 100
      shoal simulate replay *.trace --from 3600 --to 3660      (seconds as it prints them)
      shoal --debug simulate replay *.trace --seed 7           (with its whole log)
    """
    from shoal.lab.campaign import quiet
    from shoal.lab.trace_incident import find_incident
    from shoal.lab.trace_reading import read_traces
    from shoal.lab.trace_report import describe

    part = (start, float("inf") if end is None else end) if start or end is not None else None
    incident = find_incident(read_traces(traces), between_s=part)
    print("\n".join(describe(incident)), flush=True)
    is_debugging = logging.getLogger("shoal").getEffectiveLevel() <= logging.DEBUG
    same = failures = 0
    with nullcontext() if is_debugging else quiet(), progress_bar() as progress:
        for number in range(seed, seed + seeds):
            progress(f"replays, {failures} failed", number - seed, seeds)
            played = _play(incident, number)
            failures += played is None
            same += played is not None and _show(incident, played, is_first=number == seed)
    print(f"{seeds} replays, {same} as in the traces, {failures} failures", flush=True)
    if failures:
        raise typer.Exit(1)


def _play(incident: Incident, seed: int) -> Replay | None:
    """What came of one seed; None: it failed, and that was shown."""
    from shoal.lab.trace_replay import run_replay

    try:
        return run_replay(incident, seed)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in the lab is the result
        again = f"repeat it with the same files and --seed {seed} --seeds 1"
        text = f"seed {seed} failed: {type(error).__name__}: {error}\n{again}"
        print(text, file=sys.stderr, flush=True)
        return None


def _show(incident: Incident, replay: Replay, *, is_first: bool) -> bool:
    """Print the first comparison, and of the others those that differ; True: all the same."""
    from shoal.lab.trace_report import compare, same_stories

    is_same = same_stories(incident, replay) == len(incident.sessions)
    if is_first or not is_same:
        print("\n".join(compare(incident, replay)), flush=True)
    return is_same
