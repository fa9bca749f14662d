"""The benchmark suite of a checkout: its scripts, run one after the other, in one table.

The suite is a folder of the repository and not of the package: a script answers a question
of who develops Shoal. Each prints its table in Markdown, which is read here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import shoal
from shoal.base.errors import ConfigError

SCRIPT_TIMEOUT_S: Final = 3600.0
"""The longest script takes some minutes on two cores."""

_MARK: Final = '"--quick"'
"""What a script that is a benchmark has among its options; the others are parts of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRow:
    """One line of one script's table."""

    benchmark: str
    case: str
    """What was measured: the columns that are no figures."""
    figures: dict[str, str]


def suite_folder() -> Path | None:
    """benchmarks/ of the checkout that this package runs from, if it does."""
    folder = Path(shoal.__file__).resolve().parents[2] / "benchmarks"
    return folder if (folder / "METHODOLOGY.md").is_file() else None


def scripts(folder: Path, wanted: Sequence[str] = ()) -> list[Path]:
    """The benchmarks of the folder, or those of these names.

    Raises:
        ConfigError: no benchmark of that name; lists those there are.
    """
    found = {
        path.stem: path
        for path in sorted(folder.glob("*.py"))
        if _MARK in path.read_text(encoding="utf-8")
    }
    for name in wanted:
        if name not in found:
            raise ConfigError(f"no benchmark {name!r}; there are: {', '.join(found)}")
    return [found[name] for name in wanted or found]


def run_suite(
    paths: Sequence[Path],
    *,
    is_quick: bool,
    is_written: bool,
    progress: Callable[[str, int, int], None],
) -> tuple[list[SuiteRow], dict[str, str]]:
    """Run the scripts; rows of those that succeeded, and why the others did not, by name."""
    rows: list[SuiteRow] = []
    failures: dict[str, str] = {}
    options = [*(["--quick"] if is_quick else []), *([] if is_written else ["--no-write"])]
    for index, path in enumerate(paths):
        progress(path.stem, index, len(paths))
        command = [sys.executable, str(path), *options]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=SCRIPT_TIMEOUT_S, cwd=path.parent
            )
        except subprocess.TimeoutExpired:
            failures[path.stem] = f"not done within {SCRIPT_TIMEOUT_S:g} s"
            continue
        if result.returncode:
            said = result.stderr.strip().splitlines()
            failures[path.stem] = said[-1] if said else f"exit code {result.returncode}"
            continue
        rows += parse_tables(path.stem, result.stdout)
    progress("done", len(paths), len(paths))
    return rows, failures


def parse_tables(benchmark: str, text: str) -> list[SuiteRow]:
    """The rows of all Markdown tables in a script's output."""
    rows: list[SuiteRow] = []
    names: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            names = []
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not names:
            names = cells
        elif not set(line) <= set("|-: "):
            rows.append(_row(benchmark, dict(zip(names, cells, strict=False))))
    return rows


def _row(benchmark: str, cells: dict[str, str]) -> SuiteRow:
    figures = {name: cell for name, cell in cells.items() if _is_figure(cell)}
    case = [cell if not cell.isdigit() else f"{name} {cell}" for name, cell in cells.items()
            if name not in figures]  # fmt: skip
    return SuiteRow(benchmark=benchmark, case=", ".join(case), figures=figures)


def _is_figure(cell: str) -> bool:
    """Measured, not chosen: scripts write three decimals."""
    whole, point, decimals = cell.partition(".")
    return bool(point) and decimals.isdigit() and whole.lstrip("-").isdigit()
