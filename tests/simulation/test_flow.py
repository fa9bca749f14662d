"""Flow control and memory: no circle of full queues, and who gives way when it is full."""

import asyncio

import pytest

from shoal.base.errors import PeerBusy
from shoal.base.limits import ORPHAN_GRACE_S
from shoal.base.spans import Span
from shoal.lab.network import LinkConditions
from shoal.lab.toy_blocks import toy_embedding
from shoal.plan.view import Stage
from shoal.server.control import SILENCE_MAX_S
from shoal.wire.messages import WANT_ALL
from tests.simulation.scene import TINY, Scene, now_s, run_virtual, scene, until

TIGHT = 192
"""Cache tokens: two sessions of 80 fit, three don't."""


class Zigzag:
    """A router that sends a session to and fro between two servers: no real one would."""

    def __init__(self, monkeypatch):
        self.it = None
        self.order = "abab"
        monkeypatch.setattr("shoal.client.repair.choose_chain", self.choose)

    def choose(self, view, span, experience, rng, *, wanted):
        size = len(span) // len(self.order)
        return tuple(
            Stage(peer=self.it[name].peer, span=Span(index * size, (index + 1) * size))
            for index, name in enumerate(self.order)
        )

    async def read(self, it, order, prompt=0, **options):
        self.it, self.order = it, order
        return await it.read(prompt, **options)


@pytest.fixture
def zigzag(monkeypatch):
    return Zigzag(monkeypatch)


def test_servers_that_feed_each_other_with_tiny_credits(zigzag):
    """Windows and run-ahead of one byte, sessions both ways: no circle of full queues."""

    @scene("a 0:4, b 0:4", config=TINY, timeout_s=200.0)
    async def story(it):
        readers = [
            await zigzag.read(it, order, seed=seed, chunk_tokens=3)
            for seed in range(8)
            for order in ("abab", "baba")
        ]
        async with asyncio.TaskGroup() as group:
            for reader in readers:
                group.create_task(use(reader))
        for reader in readers:
            assert reader.session.epoch == 1, "it went on only because somebody asked again"
            assert reader.repairs == []
        assert {len(reader.chain) for reader in readers} == {4}

    async def use(reader):
        await reader.prefill(30)
        await reader.decode(10)
        await reader.verify(5)
        await reader.prefill(20)

    story()


def test_one_of_two_servers_that_feed_each_other_is_lost(zigzag):
    """Every gap is filled by its neighbour, which hands rows on to itself."""

    @scene("a 0:4, b 0:4", config=TINY)
    async def story(it):
        reader = await zigzag.read(it, "abab", 20, chunk_tokens=3)
        await it["a"].crash()
        await reader.decode(5)
        assert reader.chain == ["b"] * 4
        assert len(it.hops("b")) == 4
        assert reader.repairs == [(["a", "a"], ["b", "b"])]

    story()


def test_tight_servers_with_crossing_sessions(zigzag):
    """More sessions than fit at once: the oldest goes first, the others return by replay."""

    @scene("a 0:4, b 0:4", cache_tokens=TIGHT, timeout_s=300.0)
    async def story(it):
        readers, finished = [], []
        for seed in range(6):
            readers.append(await zigzag.read(it, "ab" if seed % 2 else "ba", seed=seed))
            await asyncio.sleep(0.01)
        evicted = set()

        async def use(index):
            reader = readers[index]
            await reader.prefill(40)
            await reader.decode(50)
            reader.check()
            finished.append(index)
            reader.session.close()

        async def look():
            while len(finished) < len(readers):
                for name in "ab":
                    evicted.update(h.plan.session for h in it.hops(name) if h.is_parked)
                await asyncio.sleep(0.01)

        async with asyncio.TaskGroup() as group:
            group.create_task(look())
            for index in range(len(readers)):
                group.create_task(use(index))
        assert set(finished[:2]) == {0, 1}, "both fit"
        assert finished[2:] == [2, 3, 4, 5]
        assert readers[0].session.id not in evicted
        assert len(evicted) >= 3
        assert all(reader.repairs == [] for reader in readers)
        for name in "ab":
            await until(lambda name=name: not it.hops(name), within_s=15.0)
            ledger = it[name].server.sessions.ledger
            assert ledger.free == ledger.total

    story()


@scene("a 0:2, b 2:4", cache_tokens=64)
async def test_a_full_cache_at_opening(it):
    """The client waits, and gets in when another session closes."""
    first = await it.read(60)
    opening = asyncio.ensure_future(it.read())
    await asyncio.sleep(7.0)
    assert not opening.done()
    first.check()
    first.session.close()
    it.readers.remove(first)
    closed_s = now_s()
    second = await opening
    assert now_s() - closed_s < 2.5
    await second.prefill(50)
    assert second.repairs == []
    assert it.client.experience.snapshot(now_s()).avoid == frozenset()


def test_a_full_cache_beyond_the_patience():
    async def story():
        async with Scene("a 0:2, b 2:4", cache_tokens=64, patience_s=3.0) as it:
            await it.read(60)
            with pytest.raises(PeerBusy, match="KV cache") as caught:
                await it.read()
            assert caught.value.retry_after_s == 2.0
            assert it.client.num_sessions == 1

    run_virtual(story)


@pytest.mark.parametrize("detect_after_s", [0.0, None])
def test_a_client_dies(detect_after_s):
    """All its memory at the servers is soon free; another client notices nothing."""

    @scene("a 0:2, b 2:4")
    async def story(it):
        reader = await it.read(30)
        doomed = await it.swarm.open_client()
        others = [await it.read(30, client=doomed, seed=seed) for seed in (1, 2)]
        it.gone.append(doomed)
        step = asyncio.ensure_future(others[0].prefill(100))
        await asyncio.sleep(0.02)
        it.swarm.memory.crash(doomed.me, detect_after_s=detect_after_s)
        step.cancel()
        decoding = asyncio.ensure_future(reader.decode(100, pause_s=0.3))
        silence_s = 0.0 if detect_after_s == 0.0 else SILENCE_MAX_S
        freed_s = await until(lambda: all(len(it.hops(name)) == 1 for name in "ab"), within_s=100.0)
        assert freed_s <= silence_s + ORPHAN_GRACE_S + 1.0
        for name in "ab":
            ledger = it[name].server.sessions.ledger
            length = it.hop(name, reader).settled_length
            assert ledger.total - ledger.free == ledger.pages(length)
        await decoding
        assert reader.session.epoch == 1

    story()


@scene(
    "a 0:2, b 2:4, c 4:6, spare-b 2:4",
    link=LinkConditions(delay_s=0.05, jitter_s=0.04, rate_bytes_per_s=20_000),
)
async def test_truncations_race_with_late_rows(it):
    """A server is lost in between; drafts are cut while their rows are under way."""
    reader = await it.read(20)
    for turn in range(40):
        if turn == 15:
            await it["b"].crash()
        await draft_and_cut(reader, count=6, keep=turn % 6, wait_s=0.02 * (turn % 8))
    await reader.decode(3)
    assert reader.session.rev >= 40
    assert reader.chain == ["a", "spare-b", "c"]
    assert reader.repairs == [(["b"], ["spare-b"])]


async def draft_and_cut(reader, count, keep, wait_s):
    """Send `count` rows, cut all but `keep` before they are back, then take one step."""
    session, reference = reader.session, reader.reference
    start = session.length
    tokens = [1000 * start + index for index in range(count)]
    session.append(b"".join(map(toy_embedding, tokens)), count, want=WANT_ALL)
    right = b"".join(reference.push(token, count) for token in tokens[:keep])
    await asyncio.sleep(wait_s)
    session.truncate(start + keep)
    assert await session.rows(start, start + keep) == right
    await reader.decode(1)
