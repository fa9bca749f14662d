"""How many threads a computation gets, and telling the libraries so."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.base.errors import ConfigError

_TOPOLOGY = Path("/sys/devices/system/cpu")


def physical_cores(topology: Path = _TOPOLOGY) -> int:
    """Physical cores that this process may use; 1 where that can't be told.

    Two threads on one core share its arithmetic units, so that more threads than cores
    only cost.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        path = topology / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(path.read_text(encoding="ascii").strip())
        except OSError:
            return 1
    return max(1, len(cores))


def set_threads(wanted: int | None) -> int:
    """Fix the number of compute threads, before torch is imported; returns it.

    Raises:
        ConfigError: below 1.
    """
    threads = physical_cores() if wanted is None else wanted
    if threads < 1:
        raise ConfigError(f"--threads {threads}: at least 1")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    return threads
