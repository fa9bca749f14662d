"""`shoal study`: published experiments again, on our own rules and simulator."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.base.errors import ConfigError
from shoal.cli.logs import progress_bar

if TYPE_CHECKING:
    from shoal.lab.study import Report


def _known_studies(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from shoal.lab.study_list import STUDIES

    return [name for name in ("list", "all", *STUDIES) if name.startswith(incomplete)]


NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME", autocompletion=_known_studies, show_default=False,
        help="A study; `list` to see which there are, `all` to run every one.",
    ),
]  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("study")(study)


def study(
    name: NameArgument,
    seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=100_000,
            show_default=False,
            help="How many draws of each setting (default: the study's own number).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", show_default=False, help="Write CSV, JSON and figures there, by name."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few settings and draws, for a first look.")
    ] = False,
    rtts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Round trips of real hosts for `realism`: a square CSV of milliseconds, with "
            "or without the hosts' names.",
        ),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Recorded requests for `realism`: a CSV as Azure publishes its traces, or with "
            "columns at_s, tokens_in, tokens_out. Needs --rtts.",
        ),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            "--map",
            metavar="FILE",
            show_default=False,
            help="A map with delays for `bprr-scattered`, as REPETITA has them: GTS-CE.graph, or "
            "one of the same name as ours.",
        ),
    ] = None,
) -> None:
    """Run a published experiment again, by our rules.

    Rules are those of `shoal plan`, runs those of `shoal simulate`. Prints Markdown: tables
    in which every column says whether its numbers are published,
    simulated by us or measured by us, then what was expected and what was found. With --out
    the same goes into NAME.csv and NAME.json (with versions and seeds), and figures where
    matplotlib is installed. The same seeds give the same simulated figures on any machine.
    `all` ends with the figures that Shoal is held to, and whether each holds.
    docs/studies explains every study and why some figures differ from those published.
    No recorded data comes with Shoal: `realism` says which files it was given, and what the
    README.md beside them tells of their origin.

    \b
    Examples:
      shoal study list
      shoal study bprr-scattered --quick
      shoal study all --out studies                            (takes half an hour)
      shoal study realism --rtts planetlab_rtt_ms.csv --requests azure_llm_conv_2023.csv
    """  # fmt: skip
    from shoal.lab.study import Task
    from shoal.lab.study_data import load_data
    from shoal.lab.study_list import STUDIES
    from shoal.lab.study_list import study as study_of
    from shoal.lab.study_write import markdown, write_report

    if name == "list":
        print(_listed(), flush=True)
        return
    chosen = list(STUDIES.values()) if name == "all" else [study_of(name)]
    if requests is not None and rtts is None:
        raise ConfigError("recorded requests are run on real hosts: add --rtts FILE")
    data = load_data(rtts, requests, network)
    if out is not None:
        _make_folder(out)
    reports: dict[str, Report] = {}
    for one in chosen:
        with progress_bar() as progress:
            count = seeds or (one.quick_seeds if quick else one.seeds)
            task = Task(seeds=count, is_quick=quick, progress=progress, data=data)
            report = reports[one.name] = one.run(task)
        print(f"# {one.name}\n\n{one.title}. Source: {one.source}. Seeds: {count}.\n")
        print(f"{markdown(report)}\n", flush=True)
        if out is not None:
            write_report(out, one, task, report)
    if name == "all":
        _accept(reports, out)


def _listed() -> str:
    from shoal.lab.study_list import STUDIES

    width = max(map(len, STUDIES))
    return "\n".join(f"{one.name:{width}}  {one.title}" for one in STUDIES.values())


def _accept(reports: Mapping[str, Report], out: Path | None) -> None:
    """The verdict on all that is held to a figure."""
    from shoal.lab.sim_result import write_summary
    from shoal.lab.study_acceptance import acceptance_content, acceptance_markdown, judged

    verdicts = judged(reports)
    print(f"# acceptance\n\n{acceptance_markdown(verdicts)}", flush=True)
    if out is not None:
        write_summary(out / "acceptance.json", acceptance_content(verdicts))


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't write to {out}: {error}") from error
