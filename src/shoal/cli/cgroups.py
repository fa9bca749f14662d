"""Memory limits of the control groups that this process is in: version 1, version 2, or both.

A container sees its groups mounted from its own group on, or from the system's root on, and its
path in /proc/self/cgroup may count from either: /proc/self/mountinfo says where a mount begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

UNLIMITED: Final = 1 << 60
"""Version 1 has no word for it: the largest number of bytes in whole pages."""

_CGROUPS: Final = Path("/proc/self/cgroup")
_MOUNTS: Final = Path("/proc/self/mountinfo")

Read = Callable[[PurePosixPath], str]
"""The text of a file; empty if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFiles:
    """What the files of a group are called."""

    limit: str
    used: str
    idle_files: str
    """Of memory.stat: pages of files, which are given back when memory is short."""


V1: Final = MemoryFiles(
    limit="memory.limit_in_bytes", used="memory.usage_in_bytes", idle_files="total_inactive_file"
)
V2: Final = MemoryFiles(limit="memory.max", used="memory.current", idle_files="inactive_file")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGroup:
    """A group of this process that may limit its memory."""

    folder: PurePosixPath
    top: PurePosixPath
    """Where the tree is mounted: groups from `folder` up to here limit it, too."""
    files: MemoryFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerMemory:
    """What control groups say; None: no limit, or unknown."""

    limit_bytes: int | None = None
    left_bytes: int | None = None


def container_memory(
    cgroups: Path = _CGROUPS, mounts: Path = _MOUNTS, root: Path = Path("/")
) -> ContainerMemory:
    """The lowest limit over this process, and the least that any of its groups leaves.

    `root`: where the paths in `mounts` begin.
    """

    def read(path: PurePosixPath) -> str:
        return _read(root / path.relative_to("/"))

    found = [
        one
        for group in memory_groups(_read(cgroups), _read(mounts))
        for one in _limits(group, read)
    ]
    return ContainerMemory(
        limit_bytes=min((limit for limit, _ in found), default=None),
        left_bytes=min((left for _, left in found), default=None),
    )


def memory_groups(cgroups: str, mounts: str) -> tuple[MemoryGroup, ...]:
    """The groups of a process, given its /proc/self/cgroup and /proc/self/mountinfo.

    Systems that are changing over have both versions, of which one limits memory.
    """
    groups = []
    for line in mounts.splitlines():
        # number parent device ROOT POINT options [tags] - KIND source OPTIONS
        before, _, after = line.partition(" - ")
        mount, kind = before.split(), after.split()
        if len(mount) < 5 or len(kind) < 3:
            continue
        is_v1 = kind[0] == "cgroup" and "memory" in kind[2].split(",")
        if not is_v1 and kind[0] != "cgroup2":
            continue
        path = _own_path(cgroups, "memory" if is_v1 else "")
        if path is None:
            continue
        top = PurePosixPath(mount[4])
        folder = top / _below(path, mount[3])
        groups.append(MemoryGroup(folder=folder, top=top, files=V1 if is_v1 else V2))
    return tuple(groups)


def _own_path(cgroups: str, controller: str) -> str | None:
    """The path of the group with this controller; "": version 2."""
    for line in cgroups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") and (controller or number == "0"):
            return path
    return None


def _below(path: str, mounted: str) -> str:
    """A group's path, from the group on that is mounted."""
    own, start = PurePosixPath(path), PurePosixPath(mounted)
    if own.is_relative_to(start):
        return str(own.relative_to(start))
    return "."  # the path is of another tree: what is mounted is ours


def _limits(group: MemoryGroup, read: Read) -> Iterator[tuple[int, int]]:
    """(limit, what it leaves) of the group and those above it that have one."""
    for folder in (group.folder, *group.folder.parents):
        found = group_limit(*(
            read(folder / name) for name in (group.files.limit, group.files.used, "memory.stat")
        ), idle_files=group.files.idle_files)  # fmt: skip
        if found is not None:
            yield found
        if folder == group.top:
            return


def group_limit(limit: str, used: str, stat: str, *, idle_files: str) -> tuple[int, int] | None:
    """(limit, what it leaves) by the texts of a group's files; None: it has no limit."""
    if not limit.strip().isdigit() or not used.strip().isdigit() or int(limit) >= UNLIMITED:
        return None
    files = 0
    for line in stat.splitlines():
        name, _, value = line.partition(" ")
        if name == idle_files and value.strip().isdigit():
            files = int(value)
    return int(limit), max(0, int(limit) - int(used) + files)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
