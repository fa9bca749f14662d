"""Control groups that limit memory, as containers have them. Needs root."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from shoal.cli.cgroups import V1, memory_groups
from tests.e2e import processes

_NUMBERS = itertools.count()


class MemoryGroups:
    """Starts each process in a group of its own with this limit. A context manager."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._folders: list[Path] = []

    def __enter__(self) -> MemoryGroups:
        self._is_v1, self._top = _top()
        return self

    def __exit__(self, *exc: object) -> None:
        for folder in self._folders:
            folder.rmdir()

    def launch(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """A `shoal` in a new group."""
        folder = self._new()

        def enter() -> None:
            (folder / "cgroup.procs").write_text("0")

        return processes.popen(arguments, enter=enter)

    def kills(self) -> int:
        """How many processes the system ended because their group was full."""
        name = "memory.oom_control" if self._is_v1 else "memory.events"
        return sum(
            int(line.split()[1])
            for folder in self._folders
            for line in (folder / name).read_text().splitlines()
            if line.startswith("oom_kill ")
        )

    def _new(self) -> Path:
        folder = self._top / f"shoal-test-{os.getpid()}-{next(_NUMBERS)}"
        folder.mkdir()
        self._folders.append(folder)
        limits = (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
            if self._is_v1
            else ("memory.max",)
        )
        for name in limits:
            if (folder / name).exists():
                (folder / name).write_text(str(self._limit_bytes))
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0")
        return folder


def _top() -> tuple[bool, Path]:
    """Whether memory is limited by version 1, and where its tree is mounted.

    Raises:
        OSError: there is none.
    """
    groups = memory_groups(
        Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text()
    )
    for group in groups:
        top = Path(group.top)
        if group.files is V1:
            return True, top
        if "memory" in (top / "cgroup.subtree_control").read_text().split():
            return False, top
    raise OSError("no control groups that limit memory")


def missing_groups() -> str:
    """Why groups can't be made here; empty if they can."""
    try:
        _, top = _top()
        probe = top / f"shoal-test-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"no memory groups: {error}"
    return ""
