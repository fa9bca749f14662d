"""Servers that lie about training: what is checked is right, and who was caught is left."""

import random

import numpy as np
import pytest

from shoal.base.errors import BadInput, ConfigError
from shoal.base.spans import Span
from shoal.client.training import TrainConfig, TrainingClient
from shoal.client.training_check import DIFFERENCE_MAX, Disputed, difference
from shoal.lab.training_runs import check_step, draw_batch
from tests.simulation.scene import scene

WHOLE = Span(0, 4)


def training(it, rate):
    return TrainingClient(it.client, TrainConfig(micro_tokens=6, verify_rate=rate))


def wrong(_work, block):
    """A value is altered amid the span, both ways; the blocks behind it make others of it."""
    return "wrong" if block == 2 else None


@scene("a 0:4, b 0:4, c 0:4")
async def test_a_liar_is_caught_and_what_comes_is_right(it):
    rng = random.Random(31)
    it["b"].training_fault = wrong
    client = training(it, 1.0)
    for step in range(4):
        await check_step(client, draw_batch(rng, WHOLE, step), rng)
    assert client.checks.caught == (it["b"].peer,)
    assert client.checks.passed
    assert not client.checks.unchecked
    await client.close()


@scene("a 0:2, aa 0:2, aaa 0:2, b 2:4, bb 2:4, bbb 2:4")
async def test_a_liar_in_a_part_of_the_chain(it):
    rng = random.Random(32)
    it["bb"].training_fault = wrong
    client = training(it, 1.0)
    for step in range(4):
        await check_step(client, draw_batch(rng, WHOLE, step), rng)
    assert client.checks.caught == (it["bb"].peer,)
    await client.close()


@scene("a 0:4, b 0:4")
async def test_word_against_word_ends_the_run(it):
    it["a"].training_fault = wrong
    client = training(it, 1.0)
    rng = random.Random(33)
    with pytest.raises(Disputed, match="no third server decides"):
        await check_step(client, draw_batch(rng, WHOLE, 0), rng)
    assert not client.checks.caught
    await client.close()


@scene("a 0:4")
async def test_where_nobody_else_is_it_is_counted(it):
    rng = random.Random(34)
    client = training(it, 1.0)
    trail = await check_step(client, draw_batch(rng, WHOLE, 0), rng)
    assert client.checks.unchecked == 2 * len(trail.parts)
    assert not client.checks.passed
    await client.close()


@scene("a 0:4, b 0:4", seed=3)
async def test_a_share_is_checked_and_none_unless_asked(it):
    rng = random.Random(35)
    for rate, least, most in ((0.0, 0, 0), (0.3, 1, 39)):
        client = training(it, rate)
        parts = 0
        while parts < 20:
            parts += len((await check_step(client, draw_batch(rng, WHOLE, parts), rng)).parts)
        assert least <= client.checks.passed <= most
        unchecked = sum(client.checks.taken.values())
        assert unchecked == (2 * parts - client.checks.passed if rate else 0)
        await client.close()


@pytest.mark.parametrize("encoding", sorted(DIFFERENCE_MAX))
def test_differences_have_a_measure(encoding):
    values = np.linspace(-2.0, 2.0, 1000, dtype="<f4")
    raw = {
        "float32": lambda v: v.astype("<f4").tobytes(),
        "float16": lambda v: v.astype("<f2").tobytes(),
        "bfloat16": lambda v: (v.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes(),
    }[encoding]
    assert difference(encoding, raw(values), raw(values)) == 0.0
    assert difference(encoding, raw(values), raw(values * 1.0001)) < DIFFERENCE_MAX[encoding]
    assert difference(encoding, raw(values), raw(-values)) == pytest.approx(2.0)
    assert difference(encoding, raw(0 * values), raw(values)) == pytest.approx(1.0)


def test_what_cant_be_compared_is_refused():
    with pytest.raises(BadInput, match="int8-block"):
        difference("int8-block", b"1", b"2")
    with pytest.raises(ConfigError, match="verify_rate"):
        TrainConfig(verify_rate=1.5)
