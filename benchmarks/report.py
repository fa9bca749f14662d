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
from typing import Any, Final, Literal

Source = Literal["measured", "simulated", "computed"]
"""Of figures: from clocks, from the lab's virtual time, or from formulas."""

NOT_MEASURED: Final = {"simulated": "Simulated: no clock is in it.", "computed": "Computed."}

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
    source: Source = "measured",
) -> None:
    """Print the table; write `theme_DATE.json` and `.md` into `folder` unless told not to.

    `details` (every round of every way) go to the JSON only. What is not measured says so in
    title, text and JSON: a table holds figures of one `source`.
    """
    text, title = table(rows), theme
    if source != "measured":
        text, title = f"{NOT_MEASURED[source]}\n\n{text}", f"{theme} ({source})"
    print(text)
    if "--no-write" in sys.argv:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{theme}_cpu{facts['cpus']}_{date.today().isoformat()}"
    content = {
        "theme": theme, "source": source, "environment": dict(facts),
        "rows": [dict(row) for row in rows],
    }  # fmt: skip
    if details is not None:
        content["rounds"] = dict(details)
    (folder / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    command = " ".join(["python", *map(_portable, sys.argv)])
    machine = f"{facts['cpu']}, {facts['cpus']} CPUs, load before {facts['load_before'][0]}"
    note = f"# {title}\n\n`{command}`\n{machine}\n\n{text}\n"
    (folder / f"{stem}.md").write_text(note, encoding="utf-8")
