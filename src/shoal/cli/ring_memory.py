"""How much memory this process may still take: the machine's, its container's, its own limits."""

from __future__ import annotations

import ctypes
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.cli.machine import look_at_machine

RESERVE_BYTES: Final = 64 << 20
"""Kept free of blocks and caches: buffers of the engine and the network, what allocators round
up. docs/ring.md says what was measured."""

FIRST_USE_BYTES: Final = 64 << 20
"""What torch and transformers take for good when they run a first block."""

_MALLOC: Final = ((-3, 1 << 20), (-1, 1 << 20), (-8, 2))
"""M_MMAP_THRESHOLD, M_TRIM_THRESHOLD (both also stop it from learning), M_ARENA_MAX."""

_STATUS: Final = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """What this process takes now, in bytes; 0 where the system doesn't say."""

    resident: int
    peak: int
    data: int
    """Private writable mappings: what RLIMIT_DATA counts."""
    mapped: int
    """All mappings: what RLIMIT_AS counts."""


def process_memory(path: Path = _STATUS) -> ProcessMemory:
    """This process now."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return ProcessMemory(resident=0, peak=0, data=0, mapped=0)
    found = {line.partition(":")[0]: line.split()[1] for line in lines if " kB" in line}

    def size(name: str) -> int:
        return int(found.get(name, 0)) * 1024

    return ProcessMemory(
        resident=size("VmRSS"), peak=size("VmHWM"), data=size("VmData"), mapped=size("VmSize")
    )


def give_back_early() -> None:
    """Have the allocator return large pieces to the system as soon as they are free.

    By default it learns to keep them (up to 32 MiB each), and each thread has a heap of its own:
    loading 20 blocks of SmolLM2 then held 55 MB more. No effect where there is no glibc.
    """
    libc = ctypes.CDLL(None)
    tune = getattr(libc, "mallopt", None)
    if tune is not None:
        for option, value in _MALLOC:
            tune(option, value)


def trim() -> None:
    """Give the system back what is free at the end of the heap."""
    shrink = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if shrink is not None:
        shrink(0)


def memory_left(limit_bytes: int | None = None) -> int:
    """Bytes that this process may still take; `limit_bytes`: what it may take in all."""
    now = process_memory()
    left = [look_at_machine().memory_free_bytes]  # its container's limits included
    left.append(None if limit_bytes is None else limit_bytes - now.resident)
    for kind, used in ((resource.RLIMIT_DATA, now.data), (resource.RLIMIT_AS, now.mapped)):
        soft, _ = resource.getrlimit(kind)
        left.append(None if soft == resource.RLIM_INFINITY else soft - used)
    known = [one for one in left if one is not None]
    return max(0, min(known, default=0))
