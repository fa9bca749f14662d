"""Servers that come and go: Petals' rule of placement against rules for response time.

Source: Borisov, block allocation for inference latency (master thesis, HSE 2024): up to 1.8
times faster than Petals' rule in a simulator. Its text was not at hand; the swarms are drawn
by a generator of ours (`study_swarms`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from shoal.lab.sim_result import Result
from shoal.lab.sim_scenario import Event, Moves, Reload, Scenario
from shoal.lab.sim_slots import simulate_slots
from shoal.lab.study import Chart, Check, Figure, Report, Row, Task, between, mean
from shoal.lab.study_once import ONCE_NOTES, placed_once
from shoal.lab.study_swarms import Swarm, scattered_swarm
from shoal.plan.compose import mean_s
from shoal.plan.petals import block_throughputs
from shoal.plan.place.petals import hosting
from shoal.plan.placement import Placement, uncovered
from shoal.plan.spec import Problem

EVENT_EVERY_S: Final = 300.0
"""A server comes or goes so often; in between, one server checks whether to move."""

EVENTS: Final = 90
SERVERS_MIN: Final = 15
SAMPLE_EVERY: Final = 3
"""The judges look after every third event."""

LOAD: Final = Reload(bytes_per_s=200e6)


def story(swarm: Swarm, at_start: int, rule: str, seed: int) -> Scenario:
    """Servers 0, 1, ... join one by one, then servers join or leave at random.

    The joining is part of the run, so that each rule makes its own layout from the first.
    """
    rng = random.Random(f"churn {seed}")
    count = len(swarm.planned.servers)
    present, absent = set(range(at_start)), list(range(at_start, count))
    first_s = 1.0
    events = [Event(at_s=first_s, kind="join", server=server) for server in range(at_start)]
    for number in range(1, EVENTS + 1):
        at_s = first_s + number * EVENT_EVERY_S
        if absent and (len(present) <= SERVERS_MIN or rng.random() < 0.5):
            server = absent.pop(rng.randrange(len(absent)))
            present.add(server)
            events.append(Event(at_s=at_s, kind="join", server=server))
        else:
            server = rng.choice(sorted(present))
            present.discard(server)
            absent.append(server)
            events.append(Event(at_s=at_s, kind="leave", server=server))
    return Scenario(
        problem=swarm.planned,
        requests=(),
        placement=Placement(spans=(None,) * count),
        events=tuple(events),
        moves=Moves(rule=rule, check_every_s=EVENT_EVERY_S, is_down=False, reload=LOAD),
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Churned:
    """What came of one run."""

    steps_s: tuple[float | None, ...]
    """By look: mean decode step of the judges; None where some block was hosted by nobody."""
    rows_per_s: float
    """Of the worst block, mean over the looks at which there is none without a server."""
    outage: float
    """Share of the time in which some block was hosted by nobody."""
    moves: int
    reload_bytes: int


def churned(swarm: Swarm, at_start: int, rule: str, seed: int) -> Churned:
    """Run the simulator with a rule of moving, and let the judges look."""
    scenario = story(swarm, at_start, rule, seed)
    result = simulate_slots(scenario)
    looks = [
        event.at_s + 0.9 * EVENT_EVERY_S
        for event in scenario.events[at_start + SAMPLE_EVERY - 1 :: SAMPLE_EVERY]
    ]
    steps: list[float | None] = []
    rows = []
    for at_s in looks:
        placement = replace(_served_at(result, at_s), cache_bytes=None)
        if uncovered(swarm.judged, placement.spans):
            steps.append(None)
            continue
        steps.append(mean_s(swarm.judged, placement))
        rows.append(worst_block_rows(swarm.planned, placement))
    return Churned(
        steps_s=tuple(steps),
        rows_per_s=mean(rows),
        outage=result.outage_s / scenario.events[-1].at_s,
        moves=result.moves,
        reload_bytes=result.reload_bytes,
    )


def _served_at(result: Result, at_s: float) -> Placement:
    return [placement for since_s, placement in result.history if since_s <= at_s][-1]


def worst_block_rows(problem: Problem, placement: Placement) -> float:
    """Rows per second of the block that has fewest, as Petals counts them."""
    hostings = [hosting(problem, server, span) for server, span in placement.hosted()]
    return min(block_throughputs(hostings, problem.num_blocks))


def churn(task: Task) -> Report:
    """With churn, and placed once."""
    rows = [_churn_row(task, count) for count in ((20,) if task.is_quick else (20, 30, 50))]
    once, checks = placed_once(task)
    chart = Chart(table="with churn", figures=("speed-up", "speed-up, best seed"), label="times")
    return Report(
        rows=(*rows, *once),
        checks=(*_checks(rows), *checks),
        charts=(chart,),
        notes=(*NOTES, *ONCE_NOTES),
    )


NOTES: Final = (
    "speed-up: Petals' mean decode step over the other rule's, same servers and events. The thesis "
    "says up to 1.8 in its simulator; its text and swarms were not at hand.",
    "With churn: 90 servers come or go, one every 5 minutes, at least 15 stay; between two of "
    "them one server on average checks whether to move; blocks load at 200 MB/s, 1 GB each, while "
    "the old ones serve. `latency` moves where its goal falls by 3 % and more.",
    "Holes: a share of the time in which some block had no server. `latency` counts each block "
    "with a single replica as a few milliseconds, as `shoal serve` does; Petals' rule evens out "
    "rows per second, and so replicas. The first minutes, in which all load, count too.",
    "rows/s: of the worst block, the goal of Petals' rule: the price of quicker answers.",
)


def _churn_row(task: Task, count: int) -> Row:
    runs: dict[str, list[Churned]] = {"petals": [], "latency": []}
    means: dict[str, list[float]] = {rule: [] for rule in runs}
    for seed in task.told(f"{count} servers, seed", range(task.seeds)):
        swarm = scattered_swarm(count + EVENTS // 3, seed)
        for rule, found in runs.items():
            found.append(churned(swarm, count, rule, seed))
        # Only looks at which both swarms answer: who is down must not look quick.
        pairs = zip(runs["petals"][-1].steps_s, runs["latency"][-1].steps_s, strict=True)
        both = [(old, new) for old, new in pairs if old is not None and new is not None]
        means["petals"].append(mean([old for old, _ in both]))
        means["latency"].append(mean([new for _, new in both]))
    gains = [old / new for old, new in zip(means["petals"], means["latency"], strict=True)]
    figures = [
        Figure(name="speed-up", value=mean(gains)),
        Figure(name="speed-up, best seed", value=max(gains)),
        Figure(name="speed-up, worst seed", value=min(gains)),
        Figure(name="best speed-up of the thesis", value=1.8, origin="published"),
    ]
    for rule, found in runs.items():
        figures += [
            Figure(name=f"{rule}, ms per step", value=1e3 * mean(means[rule])),
            Figure(name=f"{rule}, rows/s", value=mean([one.rows_per_s for one in found])),
            Figure(
                name=f"{rule}, share of time with a hole", value=mean([one.outage for one in found])
            ),
            Figure(name=f"{rule}, moves", value=mean([one.moves for one in found])),
            Figure(
                name=f"{rule}, GB loaded", value=mean([one.reload_bytes / 1e9 for one in found])
            ),
        ]
    return Row(table="with churn", keys=(("servers", str(count)),), figures=tuple(figures))


def _checks(rows: Sequence[Row]) -> list[Check]:
    return [
        between(
            f"with churn, {dict(row.keys)['servers']} servers: latency is quicker by 1.1 to 1.2",
            row.value("speed-up"),
            0.99,
            1.32,
        )
        for row in rows
    ]
