"""How many threads a computation gets, and telling the libraries so."""

from __future__ import annotations

import os
from pathlib import Path

from shoal.base.errors import ConfigError

_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Compiled kernels that torch keeps, one per weight shape and number of rows, twice. Its own 1,024
let a server grow by 750 MB over prompts of every length; 256 hold all decode shapes of a
block, grow by 250 MB, and were as fast (576 wide, rows from 1 to 512 at random)."""

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

    Bounds what torch's kernels keep as well, unless the environment says otherwise.

    Raises:
        ConfigError: below 1.
    """
    threads = physical_cores() if wanted is None else wanted
    if threads < 1:
        raise ConfigError(f"--threads {threads}: at least 1")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    for name, count in _KERNEL_CACHES.items():
        os.environ.setdefault(name, count)
    return threads
