"""Links between servers in another encoding than the client's: compression, off the ends."""

from itertools import pairwise

import pytest

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.lab.toy_blocks import ToySequence, decode_rows, encode_rows, toy_embedding
from tests.simulation.scene import scene

CHAIN = "a 0:2, b 2:4, c 4:6, spare-b 2:4, spare-c 4:6"
BORDERS = (0, 2, 4, 6)
TOKENS = range(12)


def answers(tokens):
    """Each token's answer when only the links between servers carry bfloat16."""
    first, *others = (ToySequence(Span(start, end)) for start, end in pairwise(BORDERS))
    rows = []
    for token in tokens:
        row = first.push(toy_embedding(token), shape=1)
        for sequence in others:
            row = sequence.push(decode_rows(encode_rows(row, "bfloat16"), "bfloat16"), shape=1)
        rows.append(row)
    return rows


async def open_compressed(it):
    return await it.client.open_session("float32", inner_encoding="bfloat16")


async def take_steps(session, tokens, right):
    for token, row in zip(tokens, right, strict=True):
        assert await session.step(toy_embedding(token), 1) == row


@pytest.mark.parametrize("lost", ["a", "b", "c"])
def test_a_lost_server_changes_nothing(lost):
    """The replacement sends in the same encoding as the one it replaces."""

    @scene(CHAIN + ", spare-a 0:2", iteration_s=0.01)
    async def story(it):
        right = answers(TOKENS)
        async with await open_compressed(it) as session:
            await take_steps(session, TOKENS[:5], right[:5])
            await it[lost].crash()
            await take_steps(session, TOKENS[5:], right[5:])
            assert len(session.recoveries) == 1

    story()


@scene(CHAIN, iteration_s=0.01)
async def test_hops_send_what_the_route_says(it):
    async with await open_compressed(it) as session:
        await take_steps(session, TOKENS, answers(TOKENS))
        sent = {
            name: {entry.encoding for hop in it.hops(name) for entry in hop.log} for name in "abc"
        }
        assert sent == {"a": {"bfloat16"}, "b": {"bfloat16"}, "c": {"float32"}}


@scene(CHAIN, iteration_s=0.01)
async def test_a_relayed_border_passes_compressed_rows_on(it):
    """Two servers can't reach each other: the client relays what it could not decode."""
    right = answers(TOKENS)
    async with await open_compressed(it) as session:
        await take_steps(session, TOKENS[:4], right[:4])
        it.network.isolate(it["a"].peer, [it["b"].peer, it["spare-b"].peer])
        await take_steps(session, TOKENS[4:8], right[4:8])
        b = session.chain[1].peer
        relayed = it.network.traffic[it.client.me, b].frames
        await take_steps(session, TOKENS[8:], right[8:])
        assert it.network.traffic[it.client.me, b].frames >= relayed + 4


@scene(CHAIN, iteration_s=0.01)
async def test_a_fork_keeps_both_encodings(it):
    right = answers(TOKENS)
    async with await open_compressed(it) as session:
        await take_steps(session, TOKENS[:6], right[:6])
        async with await session.fork(4) as fork:
            assert sum(len(it.hops(name)) for name in "abc") == 6
            await take_steps(fork, TOKENS[4:], right[4:])
        await take_steps(session, TOKENS[6:], right[6:])


@scene("a 0:2, b 2:4", timeout_s=200.0, patience_s=5.0)
async def test_nobody_speaks_it(it):
    with pytest.raises(NoRouteError, match="float32 and int8-block"):
        await it.client.open_session("float32", inner_encoding="int8-block")
