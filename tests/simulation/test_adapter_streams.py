"""Strangers on adapter streams: nonsense, silence and greed cost them the stream, nobody else."""

import asyncio
import random

import pytest

from shoal.base.errors import PeerBusy, PeerRefused, PeerUnreachable
from shoal.base.limits import PIECE_BYTES_MAX
from shoal.base.spans import Span
from shoal.lab.toy_adapters import toy_adapter
from shoal.net.channel import PURPOSE_ADAPTERS
from shoal.server.adapter_streams import IDLE_S
from shoal.server.adapters import AdapterLimits
from shoal.server.config import ServerConfig
from shoal.wire.adapters import AdapterPiece, OfferAdapter, TookAdapter, WantAdapter
from shoal.wire.messages import Error, Ping
from tests.simulation.scene import now_s, scene

BLOCKS = 4
ADAPTER = toy_adapter(random.Random(1), BLOCKS)
OTHER = toy_adapter(random.Random(2), BLOCKS)
PAIR = "a 0:2, b 2:4"
HALF = b"".join(ADAPTER.blocks[index] for index in (0, 1))
"""What server a wants of it."""


def store(it):
    return it["a"].server.adapters


async def dial(it, client=None):
    return await (client or it.client).dial(it["a"].peer, PURPOSE_ADAPTERS)


async def offer(channel, adapter=ADAPTER, call=1):
    await channel.send(OfferAdapter(call, adapter.manifest.name), adapter.manifest.text())
    answer, _ = await channel.receive()
    return answer


async def trickle(channel, messages):
    """Send them so that no pause alone is long."""
    for message, payload in messages:
        await channel.send(message, payload)
        await asyncio.sleep(IDLE_S / 3)


async def ended(channel):
    """The error that the server ended the stream with, if it said one."""
    try:
        answer, _ = await channel.receive()
    except PeerUnreachable:
        return None
    assert isinstance(answer, Error)
    return answer.code


@scene(PAIR)
async def test_one_stream_brings_several(it):
    channel = await dial(it)
    for call, adapter in enumerate((ADAPTER, OTHER), 1):
        assert await offer(channel, adapter, call) == WantAdapter(call, 0, 2)
        offset = 0
        for index in (0, 1):
            await channel.send(AdapterPiece(call, offset), adapter.blocks[index])
            offset += len(adapter.blocks[index])
        assert (await channel.receive())[0] == TookAdapter(call)
    assert await offer(channel, ADAPTER, 3) == WantAdapter(3, 0, 2, is_held=True)
    channel.close()
    reader = await it.read(4, adapter=None)
    await reader.decode(2)


BAD = {
    "a gap": [(1, HALF)],
    "nothing": [(0, b"")],
    "too much": [(0, HALF + b"x")],
    "twice": [(0, HALF[:40]), (0, HALF[:40])],
    "behind the end": [(0, HALF[:40]), (40, HALF)],
    "too large": [(0, bytes(PIECE_BYTES_MAX + 1))],
}


def nonsense(pieces):
    @scene(PAIR)
    async def story(it):
        reader = await it.read(4)
        channel = await dial(it)
        assert isinstance(await offer(channel), WantAdapter)
        assert store(it).num_bytes == len(HALF)
        for offset, data in pieces:
            await channel.send(AdapterPiece(1, offset), data)
        assert await ended(channel) == "protocol"
        assert store(it).num_bytes == 0
        await reader.decode(2)

    return story


@pytest.mark.parametrize("name", BAD)
def test_pieces_that_cannot_be(name):
    nonsense(BAD[name])()


@scene(PAIR)
async def test_messages_that_cannot_be(it):
    for messages in ([Ping(1)], [AdapterPiece(1, 0)], [OfferAdapter(1, bytes(16)), Ping(1)]):
        channel = await dial(it)
        for message in messages:
            await channel.send(message)
        codes = [await ended(channel) for _ in messages]
        assert "protocol" in codes or "adapter_bad" in codes
        channel.close()
    channel = await dial(it)
    assert isinstance(await offer(channel), WantAdapter)
    channel.close()


@scene(PAIR)
async def test_bytes_of_another_adapter_are_refused_and_the_next_is_taken(it):
    channel = await dial(it)
    assert isinstance(await offer(channel), WantAdapter)
    await channel.send(AdapterPiece(1, 0), OTHER.blocks[0] + OTHER.blocks[1])
    answer, _ = await channel.receive()
    assert (answer.code, answer.call) == ("adapter_bad", 1)
    assert store(it).num_bytes == 0
    assert isinstance(await offer(channel, ADAPTER, 2), WantAdapter)
    await channel.send(AdapterPiece(2, 0), HALF)
    assert (await channel.receive())[0] == TookAdapter(2)


@scene(PAIR)
async def test_who_sends_no_more_is_left(it):
    channel = await dial(it)
    assert isinstance(await offer(channel), WantAdapter)
    await channel.send(AdapterPiece(1, 0), HALF[:40])
    since_s = now_s()
    assert await ended(channel) is None
    assert now_s() - since_s >= IDLE_S - 1
    assert store(it).num_bytes == 0


@scene(PAIR)
async def test_who_trickles_is_left(it):
    channel = await dial(it)
    assert isinstance(await offer(channel), WantAdapter)
    since_s = now_s()
    pieces = [(AdapterPiece(1, at), HALF[at : at + 1]) for at in range(20)]
    with pytest.raises(PeerUnreachable):
        await trickle(channel, pieces)
    assert now_s() - since_s <= 2 * IDLE_S
    assert store(it).num_bytes == 0


@scene(PAIR)
async def test_who_offers_again_and_again_is_left(it):
    channel = await dial(it)
    since_s = now_s()
    with pytest.raises(PeerUnreachable):
        await trickle(channel, [(OfferAdapter(call, bytes(16)), b"") for call in range(1, 20)])
    assert now_s() - since_s <= 2 * IDLE_S


@scene(PAIR)
async def test_what_is_on_its_way_counts(it):
    first, second = await dial(it), await dial(it)
    assert isinstance(await offer(first), WantAdapter)
    again = await offer(second)
    assert (again.code, again.detail) == (PeerBusy.code, "this adapter is on its way already")
    third = await dial(it)
    assert (await offer(third)).code == PeerBusy.code
    other = await dial(it, await it.open_client())
    assert isinstance(await offer(other), WantAdapter)  # another client's is its own
    assert store(it).num_bytes == 2 * len(HALF)
    for channel in (first, second, third, other):
        channel.close()
    await asyncio.sleep(1)
    assert store(it).num_bytes == 0


@scene(PAIR, config=ServerConfig(adapters=AdapterLimits(bytes_max=len(HALF) - 1)))
async def test_one_that_is_too_large_is_refused_before_it_travels(it):
    answer = await offer(await dial(it))
    assert answer.code == PeerRefused.code
    assert "--adapter-memory" in answer.detail


@scene(PAIR, config=ServerConfig(adapters=AdapterLimits(bytes_max=0)), patience_s=3.0)
async def test_servers_that_take_none(it):
    it.client.adapters.add(ADAPTER)
    with pytest.raises(PeerRefused, match="takes no adapters"):
        await it.read(4, adapter=ADAPTER)
    reader = await it.read(4)
    await reader.decode(2)
    assert ADAPTER.manifest.num_bytes(Span(0, 2)) == len(HALF)
