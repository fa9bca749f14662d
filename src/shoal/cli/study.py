"""`shoal study`: published experiments again, on our own rules and simulator."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.logs import progress_bar

if TYPE_CHECKING:
    from shoal.lab.study import Study
    from shoal.lab.study_data import Data
    from shoal.lab.study_kept import Kept

LIST: Final = "list"
ALL: Final = "all"
ACCEPTANCE: Final = "acceptance"
"""Names that are no study's."""


def _known_studies(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from shoal.lab.study_list import STUDIES

    return [name for name in (LIST, ALL, ACCEPTANCE, *STUDIES) if name.startswith(incomplete)]


NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME", autocompletion=_known_studies, show_default=False,
        help="A study; `list` to see which there are, `all` to run every one, `acceptance` for the "
        "verdict on the results in --out.",
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
    `all` ends with the figures that Shoal is held to, and whether each holds; `acceptance` tells
    the same of results that are in --out already, and of which commit and day each is.
    docs/studies explains every study and why some figures differ from those published.
    No recorded data comes with Shoal: `realism` says which files it was given, and what the
    README.md beside them tells of their origin.

    \b
    Examples:
      shoal study list
      shoal study bprr-scattered --quick
      shoal study all --out studies                            (takes most of an hour)
      shoal study exactness --out studies                      (one again)
      shoal study acceptance --out studies                     (the verdict)
      shoal study realism --rtts planetlab_rtt_ms.csv --requests azure_llm_conv_2023.csv
    """  # fmt: skip
    from shoal.lab.study_data import load_data
    from shoal.lab.study_list import STUDIES

    if name == LIST:
        print(_listed(), flush=True)
        return
    if name == ACCEPTANCE:
        if out is None:
            raise ConfigError("say where the results are: shoal study acceptance --out DIR")
        _accept(_load(out), out)
        return
    chosen = list(STUDIES.values()) if name == ALL else [_study_of(name)]
    if requests is not None and rtts is None:
        raise ConfigError("recorded requests are run on real hosts: add --rtts FILE")
    for given, path in (("rtts", rtts), ("requests", requests), ("map", network)):
        if path is not None:
            _check_taken(given, chosen)
    data = load_data(rtts, requests, network)
    if out is not None:
        _make_folder(out)
    kept = {one.name: _run(one, seeds, quick, data, out) for one in chosen}
    if name == ALL:
        _accept(kept, out)


def _run(study: Study, seeds: int | None, quick: bool, data: Data, out: Path | None) -> Kept:
    """Run, print and write one."""
    from shoal.cli.study_made import made_now
    from shoal.lab.study import Task
    from shoal.lab.study_kept import Kept
    from shoal.lab.study_write import markdown, write_report

    made = made_now()  # of the code that was loaded, before anybody changes it
    count = seeds or (study.quick_seeds if quick else study.seeds)
    with progress_bar() as progress:
        task = Task(seeds=count, is_quick=quick, progress=progress, data=data)
        report = study.run(task)
    print(f"# {study.name}\n\n{study.title}. Source: {study.source}. Seeds: {count}.\n")
    print(f"{markdown(report)}\n", flush=True)
    if out is not None:
        try:
            write_report(out, study, task, report, made)
        except OSError as error:
            raise ConfigError(f"can't write to {out}: {error}") from error
    return Kept(checks=report.checks, seeds=count, is_quick=quick, made=made)


def _study_of(name: str) -> Study:
    from shoal.lab.study_list import study

    try:
        return study(name)
    except ConfigError as error:
        raise ConfigError(f"{error}, or one of {LIST}, {ALL}, {ACCEPTANCE}") from error


def _check_taken(given: str, chosen: Sequence[Study]) -> None:
    """Whether any study that was asked for looks at this file at all."""
    from shoal.lab.study_list import STUDIES

    if not any(given in one.takes for one in chosen):
        takers = " and ".join(one.name for one in STUDIES.values() if given in one.takes)
        raise ConfigError(f"--{given} is for {takers}; {chosen[0].name} needs no such file")


def _listed() -> str:
    from shoal.lab.study_list import STUDIES

    width = max(map(len, STUDIES))
    return "\n".join(f"{one.name:{width}}  {one.title}" for one in STUDIES.values())


def _load(folder: Path) -> dict[str, Kept]:
    from shoal.lab.study_kept import load_kept
    from shoal.lab.study_list import STUDIES

    return load_kept(folder, STUDIES)


def _accept(kept: Mapping[str, Kept], out: Path | None) -> None:
    """The verdict on all that is held to a figure."""
    from shoal.lab.sim_result import write_summary
    from shoal.lab.study_acceptance import acceptance_content, acceptance_markdown, judged

    verdicts = judged(kept)
    print(f"# acceptance\n\n{acceptance_markdown(verdicts)}", flush=True)
    if out is not None:
        try:
            write_summary(out / "acceptance.json", acceptance_content(verdicts))
        except OSError as error:
            raise ConfigError(f"can't write to {out}: {error}") from error


def _make_folder(out: Path) -> None:
    """Before minutes of work: is there a folder that can be written to?"""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"can't write to {out}: {error}") from error
