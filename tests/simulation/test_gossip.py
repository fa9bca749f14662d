"""Gossip at scale, on virtual time: what a swarm must do, and what it may cost.

With 100 peers in `scripts/check`, with 1,000 in `scripts/test`.
"""

from __future__ import annotations

import math
import random
from itertools import combinations
from statistics import median

import pytest

from shoal.base.ids import PeerId
from shoal.lab.gossip import GossipPeer, GossipSwarm, bytes_per_s
from shoal.plan.coordinates import NOWHERE, distance_s

KNOWN_WITHIN_S = 15.0
"""A crash is known everywhere."""

BYTES_PER_S_MAX = 5_000.0
"""Of an idle peer, sent and received together, framing included."""


SIZES = [100, pytest.param(1_000, marks=pytest.mark.slow)]
SPLITS = [(100, 20), pytest.param(300, 100, marks=pytest.mark.slow)]
"""How many peers, and how many of them are cut off. 1,000 heal as quickly, by hand: their
simulation takes a minute."""


def all_know(swarm: GossipSwarm) -> bool:
    """Whether everybody up sees exactly those that are up."""
    up = frozenset(one.peer for one in swarm.living())
    return all(one.knows() == up for one in swarm.living())


def forgotten(swarm: GossipSwarm, gone: GossipPeer) -> bool:
    return not any(gone.peer in one.knows() for one in swarm.living())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", SIZES)
def test_idle_traffic_a_crash_and_churn(count: int) -> None:
    rng = random.Random(count)
    swarm = GossipSwarm(rng)
    swarm.grow(count)
    swarm.run(10.0)
    traffic = bytes_per_s(swarm, 20.0)
    assert traffic["both_mean"] < BYTES_PER_S_MAX, traffic

    dead = rng.choice(swarm.living())
    swarm.crash(dead)
    assert swarm.run(KNOWN_WITHIN_S, lambda: forgotten(swarm, dead)) < KNOWN_WITHIN_S

    churn(swarm, rng, seconds=12_000.0 / count)
    assert swarm.run(30.0, lambda: all_know(swarm)) < 30.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("count", "few"), SPLITS)
def test_a_split_swarm_heals_by_itself(count: int, few: int) -> None:
    swarm = GossipSwarm(random.Random(count))
    swarm.grow(count)
    swarm.run(10.0)
    living = swarm.living()
    swarm.split(living[:few], living[few:])
    swarm.run(60.0)
    side = frozenset(one.peer for one in living[:few])
    known = [len(one.knows() - side) for one in living[few:]]
    assert max(known) == len(living) - few, "nobody of the own side is dropped"
    missed = max(len(one.knows() & side) for one in living[few:])
    assert missed <= 0.1 * few, "of the other side only servers without a neighbour here remain"
    swarm.heal()
    assert swarm.run(60.0, lambda: all_know(swarm)) < 60.0


@pytest.mark.parametrize(
    ("count", "minutes", "wrong"),
    [(30, 4, 0.25), pytest.param(60, 10, 0.15, marks=pytest.mark.slow)],
)
def test_round_trips_that_nobody_measured_are_estimated(
    count: int, minutes: int, wrong: float
) -> None:
    """Hosts in a few regions, each with a last mile of its own, as PlanetLab's are."""
    rng = random.Random(count)
    regions = [(rng.uniform(0, 0.15), rng.uniform(0, 0.15)) for _ in range(5)]
    spots: dict[PeerId, tuple[float, float, float]] = {}

    def rtt_s(one: PeerId, other: PeerId) -> float:
        (a, b, mile), (c, d, other_mile) = spots[one], spots[other]
        return math.hypot(a - c, b - d) + mile + other_mile

    swarm = GossipSwarm(rng, lambda one, other: rtt_s(one, other) / 2)
    swarm.grow(count)
    for peer in swarm.peers:
        x, y = rng.choice(regions)
        spots[peer] = (x + rng.gauss(0, 0.008), y + rng.gauss(0, 0.008), rng.uniform(0.001, 0.02))
    swarm.run(60.0 * minutes)
    places = {peer: one.gossiper.coordinate or NOWHERE for peer, one in swarm.peers.items()}
    off = [
        abs(distance_s(places[one], places[other]) - rtt_s(one, other)) / rtt_s(one, other)
        for one, other in combinations(spots, 2)
    ]
    assert median(off) < wrong


def churn(swarm: GossipSwarm, rng: random.Random, seconds: float) -> None:
    """10 % a minute vanish, and as many come; one in three leaves politely."""
    events = round(0.1 * len(swarm.living()) * seconds / 60.0)
    for number in range(events):
        one = rng.choice(swarm.living())
        if number % 3 == 0:
            swarm.leave(one)
        else:
            swarm.crash(one, is_silent=number % 3 == 1)
        swarm.join()
        swarm.run(seconds / events)


def test_a_polite_leaver_is_forgotten_without_suspicion() -> None:
    swarm = GossipSwarm(random.Random(3))
    swarm.grow(50)
    swarm.run(5.0)
    gone = swarm.living()[0]
    swarm.leave(gone)
    assert swarm.run(10.0, lambda: forgotten(swarm, gone)) < 5.0
    assert not any(one.gossiper.around.counts["accused"] for one in swarm.peers.values())


def test_a_newcomer_is_known_within_seconds() -> None:
    swarm = GossipSwarm(random.Random(4))
    swarm.grow(100)
    swarm.run(10.0)
    swarm.join()
    assert swarm.run(20.0, lambda: all_know(swarm)) < 5.0


def test_many_that_vanish_at_once_are_noticed() -> None:
    swarm = GossipSwarm(random.Random(5))
    swarm.grow(100)
    swarm.run(10.0)
    for one in swarm.living()[:30]:
        swarm.crash(one)
    assert swarm.run(60.0, lambda: all_know(swarm)) < 30.0


def test_servers_whose_neighbours_all_went_too_are_noticed_later() -> None:
    """A fifth is cut off: it watches only some of the others, and dials the rest in time."""
    swarm = GossipSwarm(random.Random(8))
    swarm.grow(50)
    swarm.run(10.0)
    few, most = swarm.living()[:10], swarm.living()[10:]
    swarm.split(few, most)
    side = frozenset(one.peer for one in few)
    assert swarm.run(400.0, lambda: all(one.knows() == side for one in few)) < 400.0


def test_a_swarm_may_idle_for_long() -> None:
    """Everybody renews in time, nobody is suspected, and the graph stays whole."""
    swarm = GossipSwarm(random.Random(6))
    swarm.grow(8)
    swarm.run(1800.0)
    assert all_know(swarm)
    counts = [one.gossiper.around.counts for one in swarm.living()]
    assert not any(count["accused"] or count["flood"] for count in counts)
    assert min(len(one.gossiper.neighbours) for one in swarm.living()) >= 3


def test_the_same_seed_gives_the_same_run() -> None:
    runs = []
    for _ in range(2):
        swarm = GossipSwarm(random.Random(7))
        swarm.grow(20)
        swarm.run(30.0)
        swarm.crash(swarm.living()[3])
        swarm.run(30.0)
        runs.append([(one.sent_bytes, one.received_bytes) for one in swarm.living()])
    assert runs[0] == runs[1]
