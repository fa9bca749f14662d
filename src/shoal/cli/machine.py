"""What this machine is: cores, memory, disk, limits. Reads the system, decides nothing."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from shoal.cli.cgroups import container_memory
from shoal.cli.threads import physical_cores

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a command may use here. None where the system doesn't say."""

    cores: int
    """Physical ones."""
    cpu_quota: float | None
    """CPUs that a container may use on average."""
    memory_bytes: int | None
    memory_free_bytes: int | None
    """What new programs can take without swapping."""
    open_files_max: int | None
    """Soft limit of this process; None: no limit, or unknown."""


def look_at_machine() -> Machine:
    """The machine as it is now."""
    total, free = _memory()
    container = container_memory()
    if container.limit_bytes is not None and total is not None:
        total = min(total, container.limit_bytes)
    if container.left_bytes is not None and free is not None:
        free = min(free, container.left_bytes)
    return Machine(
        cores=physical_cores(),
        cpu_quota=_cpu_quota(),
        memory_bytes=total,
        memory_free_bytes=free,
        open_files_max=_open_files_max(),
    )


def _memory(path: Path = _MEMINFO) -> tuple[int | None, int | None]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        names = os.sysconf_names
        if "SC_PHYS_PAGES" not in names:
            return None, None
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total, None
    kilobytes = {line.partition(":")[0]: line.split()[1] for line in lines if ":" in line}
    total_kb, free_kb = kilobytes.get("MemTotal"), kilobytes.get("MemAvailable")
    return (
        None if total_kb is None else int(total_kb) * 1024,
        None if free_kb is None else int(free_kb) * 1024,
    )


def _cpu_quota(folder: Path = _CGROUP) -> float | None:
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _open_files_max() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def disk_free_bytes(folder: Path) -> tuple[int, bool]:
    """(free bytes, may we write) of a folder that need not exist yet."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    return shutil.disk_usage(there).free, os.access(there, os.W_OK)


def own_address() -> str | None:
    """Our address towards the outside; None without a network. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documents: nobody is there
        except OSError:
            return None
        return str(probe.getsockname()[0])
