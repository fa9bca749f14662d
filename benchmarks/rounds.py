"""Rounds that count: ways to do the same take turns, and disturbed rounds are dropped.

A round is dropped when processes outside the benchmark may have made it more than 5 %
longer: METHODOLOGY.md says how that is judged from Linux's accounts of threads that could
have run and had to wait. Where there are none, rounds are kept and the result says that
nobody checked them.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

LOST_SHARE_MAX: Final = 0.05
"""Of a round's length: a round that others may have made longer by more was disturbed."""

ROUNDS_PER_WANTED: Final = 3
"""Give up after this many rounds per round that is wanted."""

PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTimes:
    """What the threads of one process have had, in seconds."""

    loop_s: float
    """On a core, the first thread: here the event loop."""
    compute_s: float
    """On a core, the other threads together."""
    waited_s: float
    """Able to run, but not running, all threads."""

    @property
    def ran_s(self) -> float:
        """On a core, all threads."""
        return self.loop_s + self.compute_s

    def since(self, before: CpuTimes | None) -> CpuTimes:
        """The difference; threads that ended meanwhile take theirs with them."""
        old = before or CpuTimes(loop_s=0.0, compute_s=0.0, waited_s=0.0)
        return CpuTimes(
            loop_s=max(0.0, self.loop_s - old.loop_s),
            compute_s=max(0.0, self.compute_s - old.compute_s),
            waited_s=max(0.0, self.waited_s - old.waited_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The accounts at one moment."""

    at_s: float
    busy_s: float
    """Of all cores since boot, interrupts included."""
    stolen_s: float
    """What a hypervisor took from all cores."""
    processes: Mapping[int, CpuTimes]
    """This process and all that came from it, by process id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Who had the cores during a round."""

    wall_s: float
    workers: Mapping[str, CpuTimes]
    others_s: float
    """Core time of processes that are not part of the benchmark."""
    stolen_s: float

    @property
    def lost_s(self) -> float:
        """The most by which others can have made the round longer; waiting for its own kind is
        no loss. Workers that depend on each other lose one after the other, so that all that
        they waited counts."""
        waited_s = sum(times.waited_s for times in self.workers.values())
        return min(waited_s, self.others_s) + self.stolen_s

    @property
    def lost_share(self) -> float:
        """Of the round's length."""
        return self.lost_s / self.wall_s if self.wall_s > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "wall_s": round(self.wall_s, 3),
            "others_s": round(self.others_s, 3),
            "stolen_s": round(self.stolen_s, 3),
            "lost_share": round(self.lost_share, 4),
            "workers": {
                worker: {
                    "loop_s": round(times.loop_s, 3),
                    "compute_s": round(times.compute_s, 3),
                    "waited_s": round(times.waited_s, 3),
                }
                for worker, times in self.workers.items()
            },
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to do it: who works, and how to measure a round."""

    workers: Mapping[str, int]
    """Names and process ids of those that compute in a round."""
    measure: Callable[[], Awaitable[float]]
    """Runs one round; returns its figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One figure and what it was measured under; no usage: the system keeps no accounts."""

    value: float
    usage: Usage | None

    @property
    def is_disturbed(self) -> bool:
        """Whether others took too much."""
        return self.usage is not None and self.usage.lost_share > LOST_SHARE_MAX


@dataclass(slots=True)
class Rounds:
    """All rounds of one way."""

    taken: list[Round] = field(default_factory=list)

    @property
    def kept(self) -> list[float]:
        """Figures of the rounds that count."""
        return [one.value for one in self.taken if not one.is_disturbed]

    @property
    def median(self) -> float | None:
        """None when every round was disturbed."""
        return median(self.kept) if self.kept else None

    def over(self, base: Rounds) -> float | None:
        """This median divided by that one; None if either has no figure."""
        mine, theirs = self.median, base.median
        return None if mine is None or not theirs else mine / theirs

    def cells(self) -> dict[str, object]:
        """How many rounds count, for the table."""
        dropped: object = len(self.taken) - len(self.kept)
        if any(one.usage is None for one in self.taken):
            dropped = "unchecked"
        return {"rounds": len(self.kept), "dropped": dropped}

    def details(self) -> list[dict[str, Any]]:
        """Every round, for the JSON."""
        return [
            {"value": one.value, "is_dropped": one.is_disturbed}
            | ({} if one.usage is None else one.usage.as_dict())
            for one in self.taken
        ]


async def take_rounds(
    ways: Mapping[str, Way], wanted: int, read: Callable[[], Reading | None] | None = None
) -> dict[str, Rounds]:
    """Let the ways take turns until each has so many rounds that count, or too many that don't.

    The first turn warms up and is thrown away. `read` gives the system's accounts.
    """
    read = read or read_accounts
    rounds = {name: Rounds() for name in ways}
    for way in ways.values():
        await way.measure()
    for _ in range(wanted * ROUNDS_PER_WANTED):
        for name, way in ways.items():
            if len(rounds[name].kept) < wanted:
                rounds[name].taken.append(await _one_round(way, read))
    return rounds


async def _one_round(way: Way, read: Callable[[], Reading | None]) -> Round:
    before = read()
    value = await way.measure()
    after = read()
    if before is None or after is None:
        return Round(value=value, usage=None)
    return Round(value=value, usage=usage_between(before, after, way.workers))


def usage_between(before: Reading, after: Reading, workers: Mapping[str, int]) -> Usage:
    """What happened between two readings."""
    ours = {pid: times.since(before.processes.get(pid)) for pid, times in after.processes.items()}
    ran_s = sum(times.ran_s for times in ours.values())
    ended = [name for name, pid in workers.items() if pid not in ours]
    if ended:
        raise SystemExit(f"ended during a round: {', '.join(ended)}")
    return Usage(
        wall_s=after.at_s - before.at_s,
        workers={name: ours[pid] for name, pid in workers.items()},
        others_s=max(0.0, after.busy_s - before.busy_s - ran_s),
        stolen_s=after.stolen_s - before.stolen_s,
    )


def read_accounts(root: int | None = None, proc: Path = PROC) -> Reading | None:
    """The accounts of `root` (this process) and its descendants; None where there are none."""
    root = os.getpid() if root is None else root
    try:
        fields = (proc / "stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
        tick_s = 1.0 / os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, irq, softirq, stolen = (int(one) * tick_s for one in fields[:8])
        processes = {pid: _times(pid, proc) for pid in family(root, _parents(proc))}
    except (OSError, ValueError, IndexError):
        return None
    return Reading(
        at_s=perf_counter(),
        busy_s=user + nice + system + irq + softirq,
        stolen_s=stolen,
        processes={pid: times for pid, times in processes.items() if times is not None},
    )


def family(root: int, parents: Iterable[tuple[int, int]]) -> set[int]:
    """`root` and its descendants, given (process, parent) pairs."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents:
        children.setdefault(parent, []).append(pid)
    found, waiting = set(), [root]
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += [child for child in children.get(pid, ()) if child not in found]
    return found


def _parents(proc: Path) -> list[tuple[int, int]]:
    pairs = []
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it ended
        # The name in parentheses may hold anything; state and parent follow it.
        pairs.append((int(folder.name), int(stat.rpartition(")")[2].split()[1])))
    return pairs


def _times(pid: int, proc: Path) -> CpuTimes | None:
    """None for a process that ended.

    Raises:
        ValueError: the system does not account for waiting threads.
    """
    loop_s = compute_s = waited_s = 0.0
    try:
        threads = list((proc / str(pid) / "task").iterdir())
    except OSError:
        return None
    for thread in threads:
        try:
            values = (thread / "schedstat").read_text(encoding="ascii").split()
        except FileNotFoundError as error:
            if thread.exists():
                raise ValueError("no schedstat") from error
            continue  # it ended
        except ProcessLookupError:
            continue
        ran_s, wait_s = int(values[0]) / 1e9, int(values[1]) / 1e9
        waited_s += wait_s
        if thread.name == str(pid):
            loop_s = ran_s
        else:
            compute_s += ran_s
    return CpuTimes(loop_s=loop_s, compute_s=compute_s, waited_s=waited_s)
