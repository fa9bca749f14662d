"""Servers that place themselves: holes are filled, nobody dances, nothing is uncovered."""

import asyncio
import random
from dataclasses import replace

import pytest

from shoal.base.spans import Span
from shoal.lab.clock import run_virtual
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.lab.placing import Coverage, PlacedSpec, PlacedSwarm
from shoal.plan.rebalance import WAIT_S
from shoal.server.rebalancing import HOLE_JITTER_S, RebalanceTimes

BLOCKS = 12
PERIOD_S = 20.0
NOTICED_S = 2.0
"""A process that dies breaks its streams: neighbours tell all."""
POLICIES = ("petals", "latency")
SIX = PlacedSpec(num_blocks=6, load_s=5.0)


def placed(policy, story, *, seed=1):
    async def run():
        rng = random.Random(seed)
        network = SimulatedNetwork(rng, default=LinkConditions(delay_s=0.02, jitter_s=0.02))
        times = RebalanceTimes(period_s=PERIOD_S)
        async with PlacedSwarm(network, rng, BLOCKS, policy, times) as swarm:
            await story(swarm)

    run_virtual(run, timeout_s=20_000.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_crash_leaves_a_hole_that_somebody_fills(policy):
    async def story(swarm):
        await swarm.grow(SIX, SIX, SIX)
        assert set(swarm.spans()) == {Span(0, 6), Span(6, 12)}
        alone = next(one for one in swarm.servers if swarm.spans()[one.span] == 1)
        await alone.crash()
        swarm.coverage = Coverage()
        await asyncio.sleep(120)
        assert swarm.moves == 1
        assert set(swarm.spans()) == {Span(0, 6), Span(6, 12)}
        assert 0 < swarm.coverage.uncovered_s <= NOTICED_S + HOLE_JITTER_S + WAIT_S + SIX.load_s

    placed(policy, story)


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_all_in_one_place_spread_once_and_rest(policy):
    async def story(swarm):
        lopsided = [replace(SIX, span=Span(0, 6))] * 5
        await swarm.grow(*lopsided, replace(SIX, span=Span(6, 12)))
        swarm.coverage = Coverage()
        await asyncio.sleep(300)
        assert swarm.spans() in (
            {Span(0, 6): 3, Span(6, 12): 3},
            {Span(0, 6): 4, Span(6, 12): 2},
        )
        moves = swarm.moves
        assert moves <= 3
        await asyncio.sleep(300)
        assert swarm.moves == moves
        assert swarm.coverage.uncovered_s == 0

    placed(policy, story)


@pytest.mark.parametrize("policy", [pytest.param("petals", marks=pytest.mark.slow), "latency"])
def test_a_split_uncovers_nothing_in_the_whole_and_both_sides_recover(policy):
    """Each side has servers enough for all blocks, but one lacks half of them at first."""

    async def story(swarm):
        one, two = Span(0, 6), Span(6, 12)
        specs = [replace(SIX, span=span) for span in (one, one, one, two, two)]
        servers = await swarm.grow(*specs)
        swarm.coverage = Coverage()
        swarm.split(servers[:2], servers[2:])
        await asyncio.sleep(240)
        poor, rich = (coverage for _, coverage in swarm.sides.values())
        assert poor.uncovered_s <= 2 * (1.5 * PERIOD_S + WAIT_S + SIX.load_s)
        assert rich.uncovered_s == 0
        swarm.network.heal()
        await asyncio.sleep(240)
        assert swarm.coverage.uncovered_s == 0
        assert set(swarm.spans()) == {one, two}

    placed(policy, story)
