"""What a study leaves behind: a table for people, CSV, JSON with the environment, figures."""

from __future__ import annotations

import csv
import importlib.util
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from shoal.lab.sim_result import write_summary
from shoal.lab.study import ORIGINS, Chart, Origin, Report, Row, Study, Task
from shoal.lab.study_kept import Made

PACKAGES: Final = ("shoal", "numpy", "scipy", "topohub", "matplotlib")

CSV_COLUMNS: Final = ("study", "table", "setting", "figure", "origin", "value")

COLOURS: Final = (
    "#2471a3", "#ca6f1e", "#7f8c8d", "#1e8449", "#c0392b", "#8e44ad", "#b7950b", "#34495e",
)  # fmt: skip
DPI: Final = 120


def environment(made: Made) -> dict[str, Any]:
    """The code and versions that figures depend on, and the machine that measured ones do."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "date": made.date,
        "commit": made.commit,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }


def markdown(report: Report) -> str:
    """Tables, checks and notes. Columns say where their numbers come from."""
    parts = [_table(name, rows) for name, rows in report.tables().items()]
    if report.checks:
        parts.append("\n".join(["Expected, and found:", "", *_check_lines(report)]))
    parts += [f"* {note}" for note in report.notes]
    return "\n\n".join(parts)


def _check_lines(report: Report) -> list[str]:
    return [
        f"* {'holds' if check.holds else 'DIFFERS'}: {check.name}; found {check.found}"
        for check in report.checks
    ]


def _table(name: str, rows: Sequence[Row]) -> str:
    """Settings go down and figures across, or the other way round where that is narrower."""
    columns = _columns(rows)
    have = [{(one.name, one.origin): one.value for one in row.figures} for row in rows]
    if len(columns) > len(rows):
        heads = ["", "origin", *map(_setting, rows)]
        body = [
            [title, origin, *(_cell(values.get((title, origin))) for values in have)]
            for title, origin in columns
        ]
    else:
        heads = [key for key, _ in rows[0].keys]
        heads += [f"{title} ({origin})" for title, origin in columns]
        body = [
            [*(value for _, value in row.keys), *(_cell(values.get(one)) for one in columns)]
            for row, values in zip(rows, have, strict=True)
        ]
    lines = [f"{name}:", "", _line(heads), "|" + "---|" * len(heads), *map(_line, body)]
    return "\n".join(lines)


def _columns(rows: Sequence[Row]) -> list[tuple[str, Origin]]:
    """All figures that some row has, in order."""
    return list(dict.fromkeys((one.name, one.origin) for row in rows for one in row.figures))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_report(folder: Path, study: Study, task: Task, report: Report, made: Made) -> list[Path]:
    """`NAME.csv`, `NAME.json` and, where matplotlib is installed, `NAME-N.png` in `folder`."""
    paths = [folder / f"{study.name}.csv", folder / f"{study.name}.json"]
    _write_csv(paths[0], study, report)
    write_summary(paths[1], _content(study, task, report, made))
    if importlib.util.find_spec("matplotlib") is not None:
        tables = report.tables()
        for number, chart in enumerate(report.charts, 1):
            path = folder / f"{study.name}-{number}.png"
            draw(path, study.title, tables[chart.table], chart)
            paths.append(path)
    return paths


def _write_csv(path: Path, study: Study, report: Report) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for row in report.rows:
            setting = _setting(row)
            for figure in row.figures:
                writer.writerow(
                    [study.name, row.table, setting, figure.name, figure.origin, figure.value]
                )


def _setting(row: Row) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.keys)


def _content(study: Study, task: Task, report: Report, made: Made) -> Mapping[str, Any]:
    return {
        "study": study.name,
        "title": study.title,
        "source": study.source,
        "seeds": list(range(task.seeds)),
        "quick": task.is_quick,
        "data": list(task.data.provenances),
        "environment": environment(made),
        "origins": list(ORIGINS),
        "rows": [
            {
                "table": row.table,
                "setting": dict(row.keys),
                "figures": [
                    {"name": figure.name, "origin": figure.origin, "value": figure.value}
                    for figure in row.figures
                ],
            }
            for row in report.rows
        ],
        "checks": [
            {"expected": check.name, "found": check.found, "holds": check.holds}
            for check in report.checks
        ],
        "notes": list(report.notes),
    }


def draw(path: Path, title: str, rows: Sequence[Row], chart: Chart) -> None:
    """Bars: a group per row, a colour per figure; what is published is hatched.

    matplotlib is loaded here.
    """
    from matplotlib.figure import Figure

    columns: list[tuple[str, Origin]] = [
        (name, origin)
        for name in chart.figures
        for origin in ORIGINS
        if any((one.name, one.origin) == (name, origin) for row in rows for one in row.figures)
    ]
    figure = Figure(figsize=(max(6.0, 1.1 * len(rows) + 2.5), 4.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(columns))
    for index, (name, origin) in enumerate(columns):
        places, values = [], []
        for place, row in enumerate(rows):
            for one in row.figures:
                if (one.name, one.origin) == (name, origin):
                    places.append(place + (index - (len(columns) - 1) / 2) * width)
                    values.append(one.value)
        axes.bar(
            places, values, width, label=f"{name} ({origin})", color=COLOURS[index % len(COLOURS)],
            hatch="//" if origin == "published" else None, edgecolor="white",
        )  # fmt: skip
    axes.set_xticks(
        range(len(rows)), [_setting(row).replace(", ", "\n") for row in rows], fontsize=7
    )
    axes.set_ylabel(chart.label)
    if chart.is_logarithmic:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=DPI)
