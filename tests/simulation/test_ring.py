"""Samples round a ring, on the real client and server: slots fill it and stay apart."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import pytest

from shoal.base.errors import ConfigError
from shoal.client.samples import SampleLimits
from shoal.client.turnstile import Turnstile
from shoal.lab.clock import run_virtual
from shoal.lab.sim_ring import RingCase, simulate_ring
from shoal.plan.slots import Slots, choose_slots
from shoal.plan.spec import DecodeTimes

BLOCK = DecodeTimes(points=((1, 2.0e-3), (16, 3.0e-3), (64, 6.0e-3)))
HEAD = DecodeTimes(points=((1, 3.2e-3), (16, 4.0e-3)))
TWO = RingCase(splits=(5, 7), block=BLOCK, head=HEAD, samples=2, hop_s=1e-4, handling_s=4e-4)


def test_two_nodes_and_two_samples_take_half_the_time_of_one_node():
    one = simulate_ring(replace(TWO, splits=(12,), way="single"))
    two = simulate_ring(TWO)
    assert 1.8 <= two.tokens_per_s / one.tokens_per_s <= 2.0
    assert min(two.busy) > 0.9


@pytest.mark.parametrize("samples", [4, 8, 24])
def test_slots_beat_whoever_waits_runs(samples):
    slots = simulate_ring(replace(TWO, samples=samples))
    free = simulate_ring(replace(TWO, samples=samples, way="free"))
    assert slots.tokens_per_s > 1.2 * free.tokens_per_s
    # All stay in as many groups as planned.
    assert slots.rows_per_pass == pytest.approx(samples / slots.slots, rel=0.05)
    assert slots.tokens_per_s == pytest.approx(
        choose_slots(TWO.times(), samples).tokens_per_s, rel=0.06
    )


def test_lengths_differ_and_the_next_is_admitted():
    case = replace(TWO, samples=9, tokens=(6, 40, 17, 29))
    result = simulate_ring(case)
    wanted = sum(case.tokens[number % 4] for number in range(case.samples))
    assert len(result.at_s) == wanted
    assert result.whole_tokens_per_s > 0


def test_long_ways_are_filled_with_more_slots():
    far = replace(TWO, samples=12, hop_s=0.05)
    many, few = simulate_ring(far), simulate_ring(replace(far, fixed_slots=2))
    assert many.slots >= 5
    assert many.tokens_per_s > 1.02 * few.tokens_per_s


def test_a_slot_that_stays_away_does_not_hold_up_the_others():
    async def story() -> list[tuple[int, float]]:
        turnstile = Turnstile(lambda samples: Slots(count=1, cycle_s=0.01))
        passed: list[tuple[int, float]] = []
        clock = asyncio.get_running_loop().time

        async def sample(number: int, away_s: float) -> None:
            for _ in range(3):
                await turnstile.enter(number)
                passed.append((number, clock()))
                await asyncio.sleep(away_s)
            turnstile.leave(number)

        await asyncio.gather(sample(0, math.pi * 100), sample(1, 0.01))
        turnstile.close()
        return passed

    passed = run_virtual(story)
    others = [at_s for number, at_s in passed if number == 1]
    assert len(others) == 3
    assert max(others) < 10.0


def test_a_sample_that_leaves_while_it_waits_is_forgotten():
    async def story() -> int:
        turnstile = Turnstile(lambda samples: Slots(count=1))
        await turnstile.enter(1)
        waiting = asyncio.ensure_future(turnstile.enter(2))
        await asyncio.sleep(0)
        waiting.cancel()
        turnstile.leave(2)
        turnstile.leave(2)
        turnstile.leave(1)
        await asyncio.gather(waiting, return_exceptions=True)
        turnstile.close()
        return turnstile.samples

    assert run_virtual(story) == 0


def test_samples_need_room():
    with pytest.raises(ConfigError, match="at least 1"):
        SampleLimits(at_once=0, prompts_at_once=1)
    with pytest.raises(ConfigError, match="as many speeds"):
        replace(TWO, speeds=(1.0,))
