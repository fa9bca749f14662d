"""`shoal bench`: how fast is it here? One model, or the whole suite of a checkout."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.interrupts import noticing_interrupts
from shoal.cli.logs import progress_bar
from shoal.cli.options import JsonOption, ThreadsOption
from shoal.cli.suite import SuiteRow, run_suite, scripts, suite_folder
from shoal.cli.threads import set_threads

if TYPE_CHECKING:
    from shoal.cli.benching import BenchRow

TOKENS: Final = 64
QUICK_TOKENS: Final = 16
REPEATS: Final = 3

OptionalModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A directory, a .gguf file, a known name or a hub id. Without it the suite of the "
        "checkout is run.",
    ),
]
ServersOption = Annotated[
    int, typer.Option(metavar="N", min=1, max=8, help="With MODEL: chains of 1 to N servers.")
]
DtypeOption = Annotated[
    str, typer.Option(help="With MODEL: float32, bfloat16 or float16, everywhere.")
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Fewer tokens and repeats: a first impression.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Without MODEL: only this benchmark; repeat for more."),
]
WriteOption = Annotated[
    bool, typer.Option("--write", help="Without MODEL: write benchmarks/results/ too.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    model: OptionalModelArgument = None,
    servers: ServersOption = 2,
    dtype: DtypeOption = "float32",
    threads: ThreadsOption = None,
    quick: QuickOption = False,
    only: OnlyOption = None,
    write: WriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a model runs here, whole and split.

    With MODEL: tokens per second, batch 1, greedy, of transformers in one process and of
    chains of servers on this machine, and what one more server adds to a token. Every process
    computes with the same number of threads; the servers take turns, so that splitting can
    only cost here, and what it costs is shown. Measure on an idle machine.

    Without MODEL, in a checkout of the repository: the scripts of benchmarks/, one table for
    all of them; see benchmarks/METHODOLOGY.md for what each figure means. That takes a
    while: --quick, or --only NAME.

    With --json the last line is an object with the same rows.

    \b
    Examples:
      shoal bench smollm2-135m-instruct
      shoal bench ./my-model --servers 3 --threads 2 --quick
      shoal bench --only hop --quick
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers must end too
    try:
        if model is None:
            _bench_suite(only or [], is_quick=quick, is_written=write, as_json=as_json)
            return
        if only or write:
            raise ConfigError("--only and --write are for the suite: leave MODEL out")
        _bench_model(model, servers, dtype, set_threads(threads), is_quick=quick, as_json=as_json)
    finally:
        signal.signal(signal.SIGTERM, before)


def _bench_model(
    model: str, servers: int, dtype: str, threads: int, *, is_quick: bool, as_json: bool
) -> None:
    with noticing_interrupts(signal.SIGINT):
        from shoal.cli.benching import BenchSettings, bench_model, hop_ms
        from shoal.cli.models import open_model
        from shoal.model.rows import torch_dtype

        torch_dtype(dtype)
        settings = BenchSettings(
            num_tokens=QUICK_TOKENS if is_quick else TOKENS,
            repeats=1 if is_quick else REPEATS,
            max_servers=servers,
            threads=threads,
            dtype=dtype,
        )
        opened = open_model(model)
    with progress_bar() as progress:
        rows, remarks = bench_model(opened, settings, progress)
    hop = hop_ms(rows)
    if as_json:
        found = {"model": opened.name, "settings": asdict(settings), "remarks": remarks}
        shown = [{**asdict(row), "token_ms": row.token_ms} for row in rows]
        print(json.dumps({**found, "rows": shown, "hop_ms": hop}), flush=True)
    else:
        _print_model(rows, hop, remarks)


def _print_model(rows: Sequence[BenchRow], hop: float | None, remarks: Sequence[str]) -> None:
    names = ("way", "tokens/s", "lowest", "highest", "ms per token", "share", "first token s")
    cells = [
        (
            row.way,
            f"{row.tokens_per_s:.1f}",
            f"{row.lowest:.1f}",
            f"{row.highest:.1f}",
            f"{row.token_ms:.2f}",
            "" if row.share is None else f"{row.share:.2f}",
            f"{row.time_to_first_token_s:.2f}",
        )
        for row in rows
    ]
    _print_table(names, cells)
    if hop is not None:
        print(f"one more server adds {hop:.2f} ms to a token")
    for remark in remarks:
        print(f"note: {remark}", file=sys.stderr)


def _bench_suite(only: Sequence[str], *, is_quick: bool, is_written: bool, as_json: bool) -> None:
    folder = suite_folder()
    if folder is None:
        raise ConfigError(
            "the benchmark suite is part of the repository, not of the package: give a MODEL, "
            "for example shoal bench smollm2-135m-instruct, or run this in a checkout"
        )
    paths = scripts(folder, only)
    _tell_load()
    with progress_bar() as progress:
        rows, failures = run_suite(
            paths, is_quick=is_quick, is_written=is_written, progress=progress
        )
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "failures": failures}), flush=True)
    else:
        _print_suite(rows, paths)
        for name, why in failures.items():
            print(f"{name} failed: {why}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


def _tell_load() -> None:
    load = os.getloadavg()[0]
    print(f"load before: {load:.1f}; measure on an idle machine", file=sys.stderr, flush=True)


def _print_suite(rows: Sequence[SuiteRow], paths: Sequence[Path]) -> None:
    if not rows:
        print(f"no figures from {', '.join(path.stem for path in paths)}")
        return
    cells = [
        (row.benchmark, row.case, ", ".join(f"{name} {cell}" for name, cell in row.figures.items()))
        for row in rows
    ]
    _print_table(("benchmark", "case", "figures"), cells)


def _print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for name in names:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
