"""Sessions with LoRA adapters: each has its own numbers, whoever dies, moves or is full."""

import asyncio
import random
from dataclasses import replace

import pytest

from shoal.base.adapters import AdapterName, AdapterPart, make_adapter_manifest
from shoal.base.errors import AdapterBad, AdapterMissing, NoRouteError, PeerError
from shoal.base.spans import Span
from shoal.client.adapters import find_adapter
from shoal.client.tending import TendConfig
from shoal.lab.campaign import quiet
from shoal.lab.chaos import draw_plan, run_plan
from shoal.lab.toy_adapters import toy_adapter
from shoal.server.adapters import AdapterLimits
from shoal.server.config import ServerConfig
from tests.simulation.scene import scene, until

BLOCKS = 4
TRIO = "a 0:2, b 2:4, spare-b 2:4"
ADAPTERS = [toy_adapter(random.Random(seed), BLOCKS) for seed in range(5)]
ONE_BYTES = ADAPTERS[0].manifest.num_bytes(Span(0, 2))
"""Of one adapter at one server."""


def limited(count, per_client=None):
    limits = AdapterLimits(
        bytes_max=count * ONE_BYTES, bytes_per_client=(per_client or count) * ONE_BYTES
    )
    return ServerConfig(adapters=limits)


async def bring(it, number, *, client=None, prompt=20):
    """A reader whose client brings one of the adapters."""
    client = client or it.client
    client.adapters.add(ADAPTERS[number])
    return await it.read(prompt, client=client, adapter=ADAPTERS[number])


def number_at(it, name):
    return len(it[name].server.adapters)


@scene(TRIO)
async def test_sessions_with_different_adapters_and_none(it):
    readers = [await bring(it, 0), await bring(it, 1), await it.read(20), await bring(it, 0)]
    for _ in range(10):
        for reader in readers:
            await reader.decode(1)
    assert number_at(it, "a") == number_at(it, "b") == 2
    assert number_at(it, "spare-b") == 0
    assert it.client.adapters.sent_bytes == 4 * ONE_BYTES
    child = await readers[1].fork(15)
    await child.decode(3)
    await readers[1].verify(4)
    await readers[1].decode(3)


@scene("a 0:2, b 2:4")
async def test_many_adapters_at_once_come_one_after_the_other(it):
    """A server takes few streams of one client; sessions of all of them open nevertheless."""
    readers = await asyncio.gather(*(bring(it, number) for number in (0, 1, 2, 3, 4, 0, 1)))
    for reader in readers:
        await reader.decode(2)
    assert number_at(it, "a") == 5
    assert it.client.adapters.sent_bytes == 2 * 5 * ONE_BYTES


@scene(TRIO)
async def test_a_replacement_gets_the_adapter_before_rows(it):
    readers = [await bring(it, 0), await bring(it, 1), await it.read(20)]
    await it["b"].crash()
    for reader in readers:
        await reader.decode(5)
        assert reader.repairs == [(["b"], ["spare-b"])]
    assert number_at(it, "spare-b") == 2


@scene(TRIO, tending=TendConfig(standby=1))
async def test_a_standby_has_it_in_time(it):
    reader = await bring(it, 0, prompt=60)
    await until(lambda: it.hop("spare-b", reader) and it.hop("spare-b", reader).cache_length > 50)
    assert number_at(it, "spare-b") == 1
    sent = it.client.adapters.sent_bytes
    await it["b"].crash()
    await reader.decode(5)
    assert it.client.adapters.sent_bytes == sent


@scene(TRIO)
async def test_a_server_that_comes_back_empty_is_brought_it_again(it):
    reader = await bring(it, 0)
    await it["a"].crash()
    await it["a"].start()
    await reader.decode(5)
    assert number_at(it, "a") == 1


@scene("a 0:4, spare 0:4")
async def test_a_move_loads_it_for_the_new_blocks(it):
    reader = await bring(it, 0)
    assert await it["a"].move(Span(0, 3), leave_s=10.0)
    assert reader.chain == ["spare"]
    await reader.decode(3)
    other = await bring(it, 1)
    await other.decode(3)
    assert await it["spare"].move(Span(2, 4), leave_s=10.0)
    for one in (reader, other, await bring(it, 0)):
        await one.decode(3)
        assert one.chain == ["a", "spare"]


@scene("a 0:4", adapters=(("story", ADAPTERS[1]),))
async def test_a_move_away_and_back_loads_it_again(it):
    for number in (0, 1):
        reader = await (bring(it, 0) if number == 0 else it.read(20, adapter=ADAPTERS[1]))
        await reader.decode(1)
        reader.check()
        reader.session.close()
        it.readers.remove(reader)
    assert await it["a"].move(Span(0, 3), leave_s=10.0)
    assert await it["a"].move(Span(0, 4), leave_s=10.0)
    for reader in (await bring(it, 0), await it.read(20, adapter=ADAPTERS[1])):
        await reader.decode(3)
    assert number_at(it, "a") == 1


@scene("a 0:2, b 2:4", config=limited(2))
async def test_unused_adapters_make_room(it):
    for number in (0, 1, 2, 3, 0):
        reader = await bring(it, number)
        await reader.decode(2)
        reader.check()
        reader.session.close()
        it.readers.remove(reader)
        assert number_at(it, "a") <= 2


@scene("a 0:2, b 2:4", config=limited(2), patience_s=5.0)
async def test_adapters_in_use_stay(it):
    first, second = await bring(it, 0), await bring(it, 1)
    with pytest.raises(PeerError, match="in use"):
        await bring(it, 2)
    for reader in (first, second):
        await reader.decode(3)
    second.check()
    second.session.close()
    it.readers.remove(second)
    third = await bring(it, 2)
    await third.decode(3)


@scene("a 0:2, b 2:4", config=limited(3, per_client=2), patience_s=5.0)
async def test_no_client_takes_all_of_it(it):
    mine = [await bring(it, 0), await bring(it, 1)]
    with pytest.raises(PeerError, match="your adapters"):
        await bring(it, 2)
    other = await it.open_client()
    theirs = await bring(it, 2, client=other)
    for reader in (*mine, theirs):
        await reader.decode(2)


@scene("a 0:2, b 2:4", patience_s=5.0)
async def test_a_name_alone_gives_nobody_anothers_adapter(it):
    await bring(it, 0)
    other = await it.open_client()
    with pytest.raises(NoRouteError, match="that has adapter"):
        await it.read(4, client=other, adapter=ADAPTERS[0])


@scene("a 0:2, b 2:4", patience_s=1000.0)
async def test_an_adapter_that_does_not_fit_is_refused_at_once(it):
    reader = await bring(it, 0)
    wide = toy_adapter(random.Random(9), BLOCKS, hidden_size=32)
    it.client.adapters.add(wide)
    with pytest.raises(AdapterBad, match="toy blocks have"):
        await it.read(4, adapter=wide)
    infinite = {index: b"\xff" * len(data) for index, data in ADAPTERS[0].blocks.items()}
    manifest = ADAPTERS[0].manifest
    bad = AdapterPart(
        manifest=make_adapter_manifest(
            manifest.config,
            manifest.encoding,
            {b.index: (b.shapes, infinite[b.index]) for b in manifest.blocks},
        ),
        blocks=infinite,
    )
    it.client.adapters.add(bad)
    with pytest.raises(AdapterBad, match="not finite"):
        await it.read(4, adapter=bad)
    wrong = replace(ADAPTERS[1], blocks=ADAPTERS[2].blocks)
    it.client.adapters.add(wrong)
    with pytest.raises(AdapterBad, match="hash"):
        await it.read(4, adapter=wrong)
    await reader.decode(3)
    assert number_at(it, "a") == 1
    assert it["a"].server.adapters.num_bytes == ONE_BYTES


@scene("a 0:2, b 2:4, plain 0:4", adapters=(("story", ADAPTERS[0]),))
async def test_adapters_of_servers(it):
    view = it.client.view()
    name = find_adapter(view, "story")
    assert name == ADAPTERS[0].manifest.name
    reader = await it.read(10, adapter=ADAPTERS[0])
    await reader.decode(3)
    assert not it.client.adapters.sent_bytes


@scene("a 0:2, b 2:4")
async def test_an_adapter_that_a_client_takes_back(it):
    reader = await bring(it, 0)
    it.client.adapters.remove(ADAPTERS[0].manifest.name)
    await reader.decode(2)  # servers have it still
    with pytest.raises(AdapterMissing):
        await it.client.adapters.bring(it["a"].peer, AdapterName(bytes(16)))


def run_with_adapters(seeds):
    """Random schedules of failures, in which half of the users bring adapters of their own."""
    with quiet():
        for seed in seeds:
            run_plan(replace(draw_plan(seed), adapters_every=2))


def test_schedules_with_adapters():
    run_with_adapters(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(5000, 5200, 50))
def test_many_schedules_with_adapters(first):
    run_with_adapters(range(first, first + 50))
