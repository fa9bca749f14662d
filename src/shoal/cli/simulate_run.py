"""`shoal simulate SCENARIO`: a scenario at one or more fidelities, over some seeds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.logs import Progress, progress_bar
from shoal.cli.options import JsonOption

if TYPE_CHECKING:
    from shoal.cli.simulate_file import ScenarioFile
    from shoal.lab.sim_result import Fidelity, Result

    Results = dict[Fidelity, list[Result]]

FIGURES: Final = {
    "requests": "requests",
    "failed": "not answered",
    "response_s_mean": "response, s: mean",
    "response_s_p50": "  half within",
    "response_s_p90": "  90 % within",
    "response_s_p99": "  99 % within",
    "wait_s_mean": "waiting, s: mean",
    "wait_s_p95": "  95 % within",
    "first_token_s_mean": "first token, s: mean",
    "first_token_s_p95": "  95 % within",
    "step_s_mean": "seconds per further token",
    "s_per_token": "response per token, s",
    "tokens_per_s": "tokens per second, all",
    "repairs": "chains repaired",
    "outage_s": "blocks without a server, s",
    "moves": "servers that moved",
    "reload_bytes": "bytes loaded by joins and moves",
    "bound_step_s": "no placement: s per token below",
    "in_step_tokens_per_s": "tokens/s of all sessions in step",
    "dispatch_response_s_low": "response with a dispatcher from, s",
    "dispatch_response_s_high": "  to, s",
}
"""What the table shows, of what there is."""

FileArgument = Annotated[
    Path, typer.Argument(metavar="SCENARIO", show_default=False, help="A TOML file.")
]
FidelityOption = Annotated[
    list[str] | None,
    typer.Option(
        "--fidelity", metavar="a|b|c", show_default=False,
        help="How exactly (default: b); repeat to see several side by side.",
    ),
]  # fmt: skip
SeedsOption = Annotated[int, typer.Option(metavar="N", min=1, max=10_000, help="How many runs.")]
FirstOption = Annotated[int, typer.Option(metavar="S", min=0, help="The first seed.")]
JobsOption = Annotated[int, typer.Option(metavar="J", min=1, max=256, help="Processes.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", show_default=False,
        help="Write requests (CSV), summary.json and figures there.",
    ),
]  # fmt: skip


def run(
    scenario: FileArgument,
    fidelity: FidelityOption = None,
    seeds: SeedsOption = 1,
    first: FirstOption = 0,
    jobs: JobsOption = 1,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate a scenario: servers, links, requests, and what happens meanwhile.

    The file describes a cluster as `shoal plan` takes it, and a workload; tables
    [simulation], [[events]] and [[requests]] say the rest (docs/simulation.md). `shoal
    simulate SCENARIO` means the same.

    Fidelity a prices every request as if it were alone. b knows memory: who finds none
    waits, servers come and go. c runs the real client and server on virtual time, with
    blocks that take the modelled time: batches, caches, repairs and replays are real.
    Figures are means over the seeds.

    With --json the output is an object with all figures by fidelity.

    \b
    Examples:
      shoal simulate examples/scenarios/evening.toml
      shoal simulate run examples/scenarios/evening.toml --fidelity b --fidelity c --out evening
    """
    from shoal.cli.simulate_file import read_scenario
    from shoal.lab.sim_result import mean_summary, plain
    from shoal.lab.sim_runs import fidelity_of

    wanted = list(dict.fromkeys(fidelity_of(word) for word in fidelity or ["b"]))
    read = read_scenario(scenario)
    if out is not None:
        _make_folder(out)
    with progress_bar() as progress:
        results = _simulate(read, wanted, range(first, first + seeds), min(jobs, seeds), progress)
    summaries = {name: mean_summary(runs) for name, runs in results.items()}
    if out is not None:
        _write(out, read, results, summaries)
    print(json.dumps(plain(summaries)) if as_json else _table(summaries), flush=True)


def _simulate(
    read: ScenarioFile, wanted: Sequence[Fidelity], seeds: range, jobs: int, progress: Progress
) -> Results:
    from shoal.lab.sim_runs import simulate, simulate_all

    results: Results = {}
    for fidelity in wanted:
        runs = results[fidelity] = []
        what = f"fidelity {fidelity}, runs"
        progress(what, 0, len(seeds))
        if jobs > 1:
            stories = [read.scenario(seed) for seed in seeds]
            for result in simulate_all(stories, fidelity, jobs=jobs):
                runs.append(result)
                progress(what, len(runs), len(seeds))
            continue
        for seed in seeds:
            told = partial(progress, f"fidelity {fidelity}, seed {seed}, requests")
            runs.append(simulate(read.scenario(seed), fidelity, told))
            progress(what, len(runs), len(seeds))
    return results


def _table(summaries: Mapping[Fidelity, Mapping[str, float]]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for fidelity in summaries:
        table.add_column(fidelity, justify="right")
    for name, title in FIGURES.items():
        cells = [_cell(summary.get(name)) for summary in summaries.values()]
        if any(cells):
            table.add_row(title, *cells)
    console = Console(file=sys.stdout, width=100, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "never"
    return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:,.4g}"


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't write to {out}: {error}") from error


def _write(
    out: Path, read: ScenarioFile, results: Results, summaries: Mapping[Fidelity, Any]
) -> None:
    from shoal.lab.sim_figures import draw_scenario
    from shoal.lab.sim_result import names_of, write_requests, write_summary

    problem = read.cluster.problem
    for fidelity, runs in results.items():
        write_requests(out / f"requests-{fidelity}.csv", runs, names_of(problem))
    seeds = [run.seed for run in next(iter(results.values()))]
    write_summary(
        out / "summary.json",
        {
            "scenario": read.name,
            "seeds": seeds,
            "simulated": True,
            "figures": summaries,
            "by_seed": {
                fidelity: {run.seed: run.summary() for run in runs}
                for fidelity, runs in results.items()
            },
        },
    )
    draw_scenario(out, problem, results)
