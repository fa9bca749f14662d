"""What soak.py found: answers, pauses, errors, and what servers still hold at the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

from recovery_servers import Fleet, Member
from shoal.link.pool import IDLE_LINK_S
from soak_chaos import Losses

KEPT: Final = ("hops", "links", "cache_tokens_in_use", "log_bytes")
"""Of these nothing may be left when all clients are gone."""

COUNTED: Final = ("tasks", "descriptors")
"""These may differ from the start by the streams to other servers."""

SLACK: Final = 6
"""By so many."""

SETTLE_S_MAX: Final = IDLE_LINK_S + 15.0
"""A vanished client's sessions live for ORPHAN_GRACE_S, streams between servers longer."""


@dataclass(slots=True)
class Soak:
    """Everything seen so far."""

    started_s: float = field(default_factory=time.monotonic)
    samples: list[dict[str, Any]] = field(default_factory=list)
    """What servers held, now and then, by name."""
    leaks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    left: dict[str, Any] = field(default_factory=dict)
    """What servers held at the end."""
    released_mb: dict[str, float] = field(default_factory=dict)
    """Own memory of servers at the end, less what only their allocator kept."""
    is_settled: bool = False
    """Whether the end was reached, where leaks are looked for."""

    async def sample(self, servers: Fleet) -> dict[str, Any]:
        """Ask everybody who answers what they hold."""
        members = list(servers.members.values())
        found = await asyncio.gather(*map(_holdings, members))
        said = {m.name: held for m, held in zip(members, found, strict=True) if held is not None}
        kept = {
            name: {what: held[what] for what in held if what != "task_names"}
            for name, held in said.items()
        }
        self.samples.append({"at_s": round(time.monotonic() - self.started_s, 1), **kept})
        return said

    async def settle(self, servers: Fleet, before: Mapping[str, Any]) -> None:
        """Wait until servers hold nothing any more, and say who does not let go."""
        until_s = time.monotonic() + SETTLE_S_MAX
        while True:
            self.left = await self.sample(servers)
            self.leaks = _leaks(self.left, before, servers)
            if not self.leaks or time.monotonic() > until_s:
                break
            await asyncio.sleep(1.0)
        for name, member in servers.members.items():
            if name in self.left:
                await member.order("release memory")
                self.released_mb[name] = round(member.resident_bytes() / 1e6, 1)
        self.is_settled = True


async def _holdings(member: Member) -> dict[str, Any] | None:
    try:
        held = await member.order("holdings")
    except (OSError, TimeoutError, ValueError):
        return None
    return held | {"resident_mb": round(member.resident_bytes() / 1e6, 1)}


def _leaks(now: Mapping[str, Any], before: Mapping[str, Any], servers: Fleet) -> list[str]:
    found = [f"{name} does not answer" for name in servers.members if name not in now]
    for name, held in now.items():
        found += [f"{name} holds {held[what]} {what}" for what in KEPT if held[what]]
        for what in COUNTED:
            if name in before and held[what] > before[name][what] + SLACK:
                more = Counter(held["task_names"]) - Counter(before[name]["task_names"])
                found.append(
                    f"{name} has {held[what]} {what}, had {before[name][what]} (new: "
                    f"{', '.join(f'{count} {task}' for task, count in more.items())})"
                )
    return found


def read_answers(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All that clients wrote; a client that was killed may have left half a line."""
    found = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return found


def rows(
    soak: Soak, answers: Sequence[Mapping[str, Any]], losses: Losses,
    faults: Sequence[str], spared: str, spans: Sequence[Collection[str]],
) -> list[dict[str, Any]]:  # fmt: skip
    """The table: a figure per line. `spans` holds the names of each span's servers."""
    given = [one for one in answers if one["work"] is not None]
    done = [one for one in given if one["error"] is None]
    equal = [one for one in done if one["same"] == one["tokens"] == one["expected"]]
    wrong = [one for one in given if one["same"] != one["tokens"]]
    pauses: dict[bool, list[float]] = {True: [], False: []}
    for one in done:
        start_s, pause_s = one["longest_at_s"], one["longest_s"]
        is_covered = all(losses.is_covered(names, start_s, start_s + pause_s) for names in spans)
        pauses[is_covered].append(pause_s)
    counts = losses.counts()
    errors = Counter(one["error"] for one in answers if one["error"] is not None)
    figures: dict[str, Any] = {
        "server processes killed (kill -9)": counts["SIGKILL"],
        "asked to leave (SIGTERM)": counts["SIGTERM"],
        "stopped for a while (SIGSTOP)": counts["SIGSTOP"],
        "clients killed": counts["client killed"],
        "answers begun": len(given),
        "answers finished": len(done),
        "equal to the reference": len(equal),
        "with a wrong token": len(wrong),
        "errors": ", ".join(f"{n} {what}" for what, n in sorted(errors.items())) or "none",
        "tokens": sum(one["tokens"] for one in given),
        "repairs": sum(one["recoveries"] for one in given),
        "planned moves": sum(one["moves"] for one in given),
        "answers with repairs": sum(1 for one in given if one["recoveries"]),
        "pause in an answer: median / p99 / longest, s": _spread(pauses[True] + pauses[False]),
        "the same, all blocks served meanwhile": _spread(pauses[True]),
        "first token: median / p99 / longest, s": _spread([one["first_s"] for one in done]),
        "numerics": _named(Counter(one["numerics"] for one in done)),
        f"own memory of {spared} (never killed), MB": _memory(soak, spared),
        "most log bytes at one server": _most(soak, "log_bytes"),
        "most tasks / descriptors at one server": f"{_most(soak, 'tasks')} / "
        f"{_most(soak, 'descriptors')}",
        "time to leave: median / p99 / longest, s": _spread(losses.leave_s),
        "left at the end": (", ".join(soak.leaks) or "nothing") if soak.is_settled else "not seen",
        "faults": "; ".join(faults) or "none",
    }
    return [{"what": what, "figure": figure} for what, figure in figures.items()]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return " / ".join(f"{value:.2f}" for value in values) or "none"
    last = quantiles(values, n=100, method="inclusive")[-1]
    return f"{median(values):.2f} / {last:.2f} / {max(values):.2f}"


def _named(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _held(soak: Soak, name: str, what: str) -> list[Any]:
    return [sample[name][what] for sample in soak.samples if name in sample]


def _memory(soak: Soak, spared: str) -> str:
    """After a fifth of the time, when everything was used once, and at the end."""
    found = _held(soak, spared, "resident_mb")
    if not found:
        return "not seen"
    text = f"{found[len(found) // 5]:.0f} -> {found[-1]:.0f}"
    released = soak.released_mb.get(spared)
    return text if released is None else f"{text}, {released:.0f} of it in use"


def _most(soak: Soak, what: str) -> int:
    names = {name for sample in soak.samples for name in sample if name != "at_s"}
    return max((value for name in names for value in _held(soak, name, what)), default=0)
