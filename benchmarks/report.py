"""What every benchmark prints and writes: a table, and JSON with the environment."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

NO_FIGURE = "disturbed"
"""Instead of a figure when every round was disturbed."""


def environment() -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    versions = {}
    for name in ("shoal", "torch", "transformers", "cryptography", "msgspec"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(value) for value in row.values()) + " |")
    return "\n".join(lines)


def _portable(argument: str) -> str:
    """Where files lie on this machine says nothing elsewhere: their names do."""
    return Path(argument).name if argument.startswith("/") else argument


def _cell(value: object) -> str:
    if value is None:
        return NO_FIGURE
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def publish(
    theme: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    details: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Print the table; write `theme_DATE.json` and `.md` into `folder` unless told not to.

    `details` (every round of every way) go to the JSON only.
    """
    text = table(rows)
    print(text)
    if "--no-write" in sys.argv:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{theme}_cpu{facts['cpus']}_{date.today().isoformat()}"
    content = {"theme": theme, "environment": dict(facts), "rows": [dict(row) for row in rows]}
    if details is not None:
        content["rounds"] = dict(details)
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    command = " ".join(["python", *map(_portable, sys.argv)])
    machine = f"{facts['cpu']}, {facts['cpus']} CPUs, load before {facts['load_before'][0]}"
    note = f"# {theme}\n\n`{command}`\n{machine}\n\n{text}\n"
    (folder / f"{stem}.md").write_text(note, encoding="utf-8")
