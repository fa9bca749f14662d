"""Processes that get a part of a core: boards that are slower than this machine's memory.

Two processes on two cores share one memory, two boards do not. With half of a core each, two
need no more of the memory than one with a whole core does. By control groups (root): of every
2 ms a group may run 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

PERIOD_US: Final = 2000
V1: Final = Path("/sys/fs/cgroup/cpu")
V2: Final = Path("/sys/fs/cgroup")

Join = Callable[[int, str], None]
"""Moves a process to a board."""


@contextmanager
def boards(share: float) -> Iterator[Join]:
    """Boards with this share of a core, each made when its first process joins.

    All processes must have ended when the context does, but for our own, which goes back.
    """
    if share >= 1.0:
        yield lambda pid, name: None
        return
    is_v1 = (V1 / "cpu.cfs_quota_us").exists() or (V1 / "cgroup.procs").exists()
    top = V1 if is_v1 else V2
    made: dict[str, Path] = {}

    def join(pid: int, name: str) -> None:
        if name not in made:
            made[name] = top / f"shoal-benchmark-{os.getpid()}-{name}"
            made[name].mkdir()
            quota = str(int(PERIOD_US * share))
            if is_v1:
                (made[name] / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (made[name] / "cpu.cfs_quota_us").write_text(quota)
            else:
                (made[name] / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        (made[name] / "cgroup.procs").write_text(str(pid))

    try:
        yield join
    finally:
        (top / "cgroup.procs").write_text(str(os.getpid()))
        for folder in made.values():
            folder.rmdir()
