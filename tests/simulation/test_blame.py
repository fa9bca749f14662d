"""Whose fault it was: a client's mistake, overload, a broken server and a broken link.

Only the last two cost trust, and what they cost passes.
"""

import asyncio
from dataclasses import replace

import pytest

from shoal.base.errors import BadInput, SessionTooLong
from shoal.client.experience import FAILED_S, PAIR_S, REGAIN_ROWS
from shoal.lab.toy_blocks import toy_embedding
from shoal.server.quotas import RETRY_AFTER_S
from tests.simulation.scene import Scene, now_s, run_virtual, scene, until

CHAIN = "a 0:2, b 2:4, c 4:6, spare-b 2:4"
ROW_BYTES = 64
TIGHT_TOKENS = 64


def held_against(it):
    """(peers avoided, whether any failed, pairs that don't meet), as names."""
    book = it.client.experience
    known = book.snapshot(now_s())
    pairs = {tuple(it.names(pair)) for pair in known.unreachable_pairs}
    return set(it.names(known.avoid)), book.has_failures, pairs


NOBODY = (set(), False, set())


async def chain_now(it):
    """The chain that a new session gets."""
    reader = await it.read(4)
    chain = reader.chain
    await reader.decode(2)
    reader.session.close()
    it.readers.remove(reader)
    return chain


# --- a client's mistake, and overload: they cost nothing -----------------------------------


@pytest.mark.parametrize(
    ("rows", "count", "error"),
    [
        (b"\xff" * ROW_BYTES, 1, BadInput),
        (b"".join(map(toy_embedding, range(2000))), 2000, SessionTooLong),
    ],
    ids=["not a number", "too long"],
)
def test_a_mistake_of_the_client_is_its_own(rows, count, error):
    """Its session ends with the reason; no server is avoided, and others go on there."""

    @scene(CHAIN, cache_tokens=1024)
    async def story(it):
        other = await it.read(10)
        reader = await it.read(4, seed=1)
        with pytest.raises(error):
            await reader.session.step(rows, count)
        it.readers.remove(reader)
        await other.decode(3)
        assert held_against(it) == NOBODY
        assert other.session.epoch == 1
        assert await chain_now(it) == ["a", "b", "c"]

    story()


def test_a_full_server_is_left_alone_until_the_time_it_named():
    """Then it is asked again, first of all: being full costs no trust."""

    async def story():
        it = Scene(CHAIN)
        it["b"].spec = replace(it["b"].spec, cache_tokens=TIGHT_TOKENS)
        async with it:
            older = await it.read(TIGHT_TOKENS, client=await it.swarm.open_client())
            assert await chain_now(it) == ["a", "spare-b", "c"]
            assert held_against(it) == ({"b"}, False, set())
            older.session.close()
            it.readers.remove(older)
            await until(lambda: held_against(it) == NOBODY, within_s=10 * RETRY_AFTER_S)
            assert await chain_now(it) == ["a", "b", "c"]

    run_virtual(story)


@scene(CHAIN, iteration_s=0.05)
async def test_a_slow_server_with_a_long_queue_is_not_at_fault(it):
    """Eight times as slow as it was, and busy with prompts of somebody else."""
    reader = await it.read(10)
    other = await it.read(client=await it.swarm.open_client(), seed=1)
    it["b"].slowness = 8.0
    prompts = asyncio.ensure_future(other.prefill(300))
    await reader.decode(10)
    await prompts
    assert held_against(it) == NOBODY
    assert reader.chain == ["a", "b", "c"]


# --- a broken server ---------------------------------------------------------------------


async def dies(it):
    await it["b"].crash()


async def raises(it):
    it["b"].fault = lambda call: "raise"


async def poisons(it):
    it["b"].fault = lambda call: "poison"


async def hangs(it):
    it["b"].hang()


async def freezes(it):
    it.network.freeze(it["b"].peer)


@pytest.mark.parametrize("way", [dies, raises, poisons, hangs, freezes])
def test_a_broken_server_is_avoided_for_a_while(way):
    """It alone; then it is tried again, and in time it is as good as any if it works."""

    @scene(CHAIN)
    async def story(it):
        reader = await it.read(10)
        await way(it)
        await reader.decode(3)
        assert reader.chain == ["a", "spare-b", "c"]
        assert held_against(it) == ({"b"}, True, set())
        it["b"].fault = None
        it["b"].unhang()
        it.network.heal()
        if not it["b"].is_up:
            await it["b"].start()
        assert await chain_now(it) == ["a", "spare-b", "c"]
        await asyncio.sleep(FAILED_S + 1)
        assert held_against(it)[0] == set()
        assert await chain_now(it) == ["a", "b", "c"]
        assert held_against(it) == (set(), True, set())  # used, but not yet trusted as before
        other = await it.read()
        await other.decode(REGAIN_ROWS)
        assert other.chain == ["a", "b", "c"]
        assert held_against(it) == NOBODY

    story()


@scene(CHAIN)
async def test_a_server_that_keeps_failing_is_avoided_for_longer_each_time(it):
    it["b"].fault = lambda call: "raise"
    for times in range(3):
        assert await chain_now(it) == ["a", "spare-b", "c"]
        await asyncio.sleep(FAILED_S * 2**times - 5)
        assert held_against(it)[0] == {"b"}, times
        await asyncio.sleep(10)
        assert held_against(it)[0] == set(), times


@scene(CHAIN)
async def test_a_few_rows_between_two_failures_make_up_for_nothing(it):
    for times in range(3):
        it["b"].fault = None
        assert await chain_now(it) == ["a", "b", "c"]
        it["b"].fault = lambda call: "raise"
        assert await chain_now(it) == ["a", "spare-b", "c"]
        await asyncio.sleep(FAILED_S * 2**times - 5)
        assert held_against(it)[0] == {"b"}, times
        await asyncio.sleep(10)
        assert held_against(it)[0] == set(), times


# --- a broken link -----------------------------------------------------------------------


@scene("a 0:2, b 2:4")
async def test_a_broken_link_is_held_against_the_pair_and_tried_again(it):
    """Neither server loses trust; after a while the pair gets another chance."""
    a, b = it["a"].peer, it["b"].peer
    reader = await it.read(10)
    it.network.isolate(a, [b])
    await reader.decode(3)
    assert held_against(it) == (set(), False, {("a", "b")})
    it.network.heal()
    await asyncio.sleep(PAIR_S)
    assert held_against(it) == NOBODY
    direct = it.network.traffic[a, b].frames
    assert await chain_now(it) == ["a", "b"]
    assert it.network.traffic[a, b].frames > direct
