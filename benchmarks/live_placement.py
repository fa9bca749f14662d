"""Which rule should servers place themselves by, knowing only what records say?

Servers come and go (the churn of the research notes on Borisov's goal: 80 blocks, four kinds of
servers, positions on a plane). Each joins by the rule; after every event one server looks whether
it should move, and moves if `shoal.plan.rebalance` lets it. The rules see spans, measured speeds
and one round trip for all hops; `latency, all round trips known` sees what no server can, and is
there to say what coordinates would be worth. Judged by what clients get: seconds per decode step
on the true round trips, mean over 12 clients. Simulated; time stands still during moves.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import hypot
from pathlib import Path
from statistics import mean
from typing import Any, Final

from report import RESULTS, environment, publish
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.compose import mean_s
from shoal.plan.live import LivePolicy, choose_join, choose_move, hostings, swarm_of
from shoal.plan.memory import CacheShape
from shoal.plan.petals import block_throughputs
from shoal.plan.place import latency
from shoal.plan.placement import Placement, uncovered
from shoal.plan.rebalance import may_leave
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model
from shoal.plan.view import ServerView, SwarmView

BLOCKS: Final = 80
KINDS: Final = ((5, 0.012, 0.4), (10, 0.007, 0.3), (20, 0.004, 0.2), (40, 0.002, 0.1))
"""Blocks, seconds per block and row, share."""
EVENTS: Final = 90
SERVERS_MIN: Final = 15
RULES: Final = ("petals, never moves", "petals", "latency, never moves", "latency",
                "latency, all round trips known")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Somewhere on the plane, in milliseconds, with a last mile."""

    x: float
    y: float
    mile: float

    def rtt_s(self, other: Place) -> float:
        """To there and back."""
        return (hypot(self.x - other.x, self.y - other.y) + self.mile + other.mile) / 1000


@dataclass(frozen=True)
class Machine:
    """A server wherever it is."""

    peer: PeerId
    place: Place
    num_blocks: int
    tau_s: float


def machine(rng: random.Random) -> Machine:
    """Any server."""
    blocks, tau_s, _ = rng.choices(KINDS, [kind[2] for kind in KINDS])[0]
    return Machine(PeerId(rng.randbytes(32)), anywhere(rng), blocks, tau_s * rng.uniform(0.8, 1.3))


def anywhere(rng: random.Random, mile: float | None = None) -> Place:
    """A place."""
    return Place(rng.uniform(0, 150), rng.uniform(0, 150), mile or rng.uniform(2, 15))


class World:
    """The servers that are there, by one rule."""

    def __init__(self, rule: str, rng: random.Random) -> None:
        self.rule = rule
        self.policy: LivePolicy = "petals" if rule.startswith("petals") else "latency"
        self.machines: list[Machine] = []
        self.spans: list[Span] = []
        self.planning = [anywhere(rng, 5.0) for _ in range(4)]
        self.judging = [anywhere(rng, 5.0) for _ in range(12)]
        self.moves = 0
        self._rng = rng

    @property
    def knows_all(self) -> bool:
        """Whether round trips are known to the rule."""
        return self.rule.endswith("known")

    def view(self) -> SwarmView:
        """What records say."""
        servers = tuple(
            seen(one, span) for one, span in zip(self.machines, self.spans, strict=False)
        )
        return SwarmView(model="m", num_blocks=BLOCKS, hidden_size=1, servers=servers)

    def problem(self, clients: Sequence[Place]) -> Problem:
        """The truth."""
        places = [one.place for one in self.machines]
        return Problem(
            model=uniform_model(BLOCKS, 1, CacheShape(values_per_token=0)),
            servers=tuple(
                ServerSpec(
                    name=str(index),
                    memory_bytes=1 << 30,
                    decode=DecodeTimes(points=((1, one.tau_s),)),
                )
                for index, one in enumerate(self.machines)
            ),
            links=Links(
                client_rtt_s=tuple(tuple(c.rtt_s(p) for p in places) for c in clients),
                server_rtt_s=tuple(tuple(p.rtt_s(q) for q in places) for p in places),
                flow="push",
                handling_s=0.018,
            ),
            workload=Workload(tokens_in=1, tokens_out=1, sessions=len(clients)),
        )

    def goal(self) -> latency.Goal:
        """For the rule that knows all."""
        return latency.careful_goal(self.problem(self.planning))

    def join(self, fresh: Machine) -> None:
        """One more server."""
        self.machines.append(fresh)
        if self.knows_all:
            placement = Placement(spans=(*self.spans, None))
            mine = len(self.spans)
            self.spans.append(latency.choose_join(self.goal(), placement, mine, fresh.num_blocks))
            return
        newcomer = replace(seen(fresh, Span(0, 1)), decode_s_per_block=0.0)
        wanted = fresh.num_blocks
        self.spans.append(choose_join(self.policy, swarm_of(self.view()), wanted, newcomer))

    def leave(self, index: int) -> None:
        """One less."""
        del self.machines[index], self.spans[index]

    def look(self) -> None:
        """One server looks whether to move."""
        if self.rule.endswith("never moves"):
            return
        me = self._rng.choice(self.machines).peer
        mine = next(i for i, one in enumerate(self.machines) if one.peer == me)
        if self.knows_all:
            target = latency.choose_move(self.goal(), Placement(spans=tuple(self.spans)), mine)
        else:
            swarm = swarm_of(self.view())
            target = choose_move(self.policy, swarm, swarm.index(me), self._rng)
        if target is not None and may_leave(self.view(), me, target, 1):
            self.spans[mine], self.moves = target, self.moves + 1

    def judged(self) -> tuple[float, float] | None:
        """Seconds per step, and rows per second of the worst block; None: not covered."""
        problem, placement = self.problem(self.judging), Placement(spans=tuple(self.spans))
        if uncovered(problem, placement.spans):
            return None
        rows = block_throughputs(hostings(swarm_of(self.view())), BLOCKS)
        return mean_s(problem, placement), min(rows)


def seen(one: Machine, span: Span) -> ServerView:
    """Its record."""
    return ServerView(
        peer=one.peer, addresses=(), span=span, cache_tokens=8192,
        decode_s_per_block=one.tau_s, prefill_s_per_block_token=one.tau_s,
    )  # fmt: skip


def run(rule: str, count: int, seed: int) -> dict[str, float]:
    """One world's life; the same servers come and go whatever the rule."""
    chance, world = random.Random(seed), World(rule, random.Random(seed + 1000))
    for _ in range(count):
        world.join(machine(chance))
    steps, rows, looks = [], [], 0
    for event in range(EVENTS):
        if len(world.machines) > SERVERS_MIN and chance.random() < 0.5:
            world.leave(chance.randrange(len(world.machines)))
        else:
            world.join(machine(chance))
        world.look()
        if event % 3 == 0:
            looks += 1
            found = world.judged()
            if found is not None:
                steps.append(found[0])
                rows.append(found[1])
    return {
        "step_ms": 1000 * mean(steps), "rows": mean(rows), "moves": world.moves,
        "out": 1 - len(steps) / looks,
    }  # fmt: skip


def all_lives(
    count: int, seeds: Sequence[int], processes: int | None
) -> dict[str, list[dict[str, float]]]:
    """Every world's life by rule, as many at once as there are processes."""
    with ProcessPoolExecutor(processes) as pool:
        jobs = {rule: [pool.submit(run, rule, count, seed) for seed in seeds] for rule in RULES}
        return {rule: [job.result() for job in own] for rule, own in jobs.items()}


def main() -> None:
    """Print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 servers, 2 seeds")
    parser.add_argument("--servers", type=int, nargs="+", default=(20, 30, 50), help="at the start")
    parser.add_argument("--processes", type=int, help="default: one per core")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    seeds = range(100, 102 if options.quick else 120)
    rows: list[dict[str, Any]] = []
    for count in (20,) if options.quick else options.servers:
        lives = all_lives(count, seeds, options.processes)
        for rule, found in lives.items():
            gains = sorted(
                base["step_ms"] / one["step_ms"]
                for base, one in zip(lives["petals"], found, strict=True)
            )
            low, high = gains[len(gains) // 10], gains[-1 - len(gains) // 10]
            rows.append({
                "servers": count, "rule": rule,
                "ms per step": round(mean(one["step_ms"] for one in found)),
                "faster than petals": round(mean(gains), 2),
                "p10 to p90": f"{low:.2f} to {high:.2f}",
                "rows/s of the worst block": round(mean(one["rows"] for one in found), 1),
                "moves": round(mean(one["moves"] for one in found), 1),
                "not covered %": round(100 * mean(one["out"] for one in found), 1),
            })  # fmt: skip
            print(rows[-1], flush=True)
    publish("live_placement", rows, environment(), folder=options.out, source="simulated")


if __name__ == "__main__":
    main()
