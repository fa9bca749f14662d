"""Fetching from several peers: whoever lies is named, whoever stalls or leaves is replaced."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from shoal.base.content import content_hash
from shoal.base.errors import ConfigError, PeerError, WeightsMissing
from shoal.base.ids import PeerId, short
from shoal.client.weight_fetch import FetchReport, WeightFetch
from shoal.client.weight_sources import Place, choose_files, fetch_manifest, survey
from shoal.client.weight_stream import STALL_S
from shoal.lab.clock import run_virtual
from shoal.lab.weights import MemoryShelf, MemoryStore
from shoal.net.address import Address
from shoal.net.channel import Channel
from shoal.server.weights import WeightsConfig, WeightServer
from shoal.wire.messages import Error, Ping
from shoal.wire.weights import GetHoldings, GetPiece, Holdings, Piece, pack_held
from tests.unit.discovery_cases import identity
from tests.unit.weights_cases import (
    FILES,
    MANIFEST,
    MODEL,
    TENSORS,
    Swarm,
    items,
    lying,
    shelf,
    swarm,
)

ALL = range(len(TENSORS))
BIG = 5


def fetch(
    peers: Swarm, store: MemoryStore, *numbers: int, progress: list[int] | None = None
) -> WeightFetch:
    seen = [] if progress is None else progress
    return WeightFetch(
        MODEL, items(*numbers), peers.dial, lambda: peers.places, store,
        lambda done, total: seen.append(done),
    )  # fmt: skip


def check(store: MemoryStore, *numbers: int) -> None:
    """Exactly these tensors are in the store."""
    wanted = {bytes.fromhex(content_hash(TENSORS[n])): TENSORS[n] for n in numbers or ALL}
    assert store.contents == wanted


async def until_begun(store: MemoryStore, num_bytes: int) -> None:
    """Wait until a draft has this many bytes."""
    while not any(len(draft) >= num_bytes for draft in store.drafts.values()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def test_exactly_what_is_wanted_comes_from_all_who_have_it() -> None:
    async def work() -> None:
        store, progress = MemoryStore(), []
        async with swarm(shelf(), shelf(held=[2, 3]), shelf(held=[5, 6])) as peers:
            report = await fetch(peers, store, 2, 3, 5, 6, progress=progress).run()
        check(store, 2, 3, 5, 6)
        total = sum(len(TENSORS[n]) for n in (2, 3, 5, 6))
        assert sum(report.fetched_bytes.values()) == total
        assert sum(server.sent_bytes for server in peers.servers) == total, "no byte twice"
        assert report.dropped == {}
        assert report.num_items == 4
        assert progress == sorted(progress)
        assert progress[-1] == total

    run_virtual(work())


def test_empty_and_tiny_tensors_come_too() -> None:
    async def work() -> None:
        store = MemoryStore()
        async with swarm(shelf()) as peers:
            await fetch(peers, store).run()
        check(store)

    run_virtual(work())


def test_the_rate_is_shared_by_all_and_lower_while_sessions_are_served() -> None:
    async def seconds(is_busy: bool) -> float:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        config = WeightsConfig(rate_bytes_per_s=1 << 20, busy_share=0.25)
        async with swarm(shelf(), config=config) as peers:
            peers.servers[0].yield_to(lambda: is_busy)
            await fetch(peers, MemoryStore(), 2, 3, 5).run()
        return loop.time() - start_s

    free_s, busy_s = run_virtual(seconds(False)), run_virtual(seconds(True))
    assert 1.5 < free_s < 2.3  # 2.3 MB at 1 MiB/s, less the last piece
    assert 3.5 * free_s < busy_s < 4.5 * free_s


def test_a_liar_is_dropped_and_named_and_its_part_comes_from_elsewhere() -> None:
    async def work() -> None:
        store = MemoryStore()
        async with swarm(lying(shelf(), BIG, at=1_200_000), shelf(held=[4, 5, 6])) as peers:
            report = await fetch(peers, store, 4, 5, 6).run()
        check(store, 4, 5, 6)
        liar = peers.places[0].peer
        if report.dropped:  # unless the honest one was chosen for it
            assert list(report.dropped) == [liar]
            assert report.dropped[liar] == f"{short(liar)} sent wrong bytes for tensor 5"

    run_virtual(work())


def test_a_liar_alone_is_an_error_that_names_it_and_what_is_missing() -> None:
    async def work() -> None:
        store = MemoryStore()
        async with swarm(lying(shelf(), BIG)) as peers:
            with pytest.raises(WeightsMissing) as caught:
                await fetch(peers, store, 4, 5).run()
            assert "1 of 2 tensors" in caught.value.detail or "2 of 2" in caught.value.detail
            assert "tensor 5" in caught.value.detail
            assert short(peers.places[0].peer) in caught.value.detail
            assert "sent wrong bytes" in caught.value.detail
            assert len(peers.dialled) == 1, "a liar is not asked again"
        assert bytes.fromhex(content_hash(TENSORS[BIG])) not in store.contents

    run_virtual(work())


def test_when_two_peers_sent_parts_of_a_wrong_tensor_the_guilty_one_is_found() -> None:
    """The first leaves after lying in its part; the second sends the rest, and is innocent."""

    async def work() -> None:
        store = MemoryStore()
        liar = WeightServer(lying(shelf(), BIG, at=0))

        async def lie_and_leave(channel: Channel) -> None:
            with contextlib.suppress(PeerError):
                await liar.serve(Leaving(channel, after=3))

        async with swarm(lie_and_leave) as peers:
            late = Late(peers)
            fetching = asyncio.create_task(fetch(peers, store, BIG).run())
            await until_begun(store, 1)
            await late.join(shelf())
            report = await fetching
            await late.leave()
        check(store, BIG)
        assert list(report.dropped) == [peers.places[0].peer]
        assert report.dropped[peers.places[0].peer] == "sent wrong bytes for tensor 5"

    run_virtual(work())


class Leaving:
    """A channel that breaks after a few answers."""

    def __init__(self, channel: Channel, after: int) -> None:
        self._channel, self._left = channel, after

    def __getattr__(self, name: str):
        return getattr(self._channel, name)

    async def send(self, *message) -> None:
        if self._left == 0:
            self._channel.close()
        self._left -= 1
        await self._channel.send(*message)


class Late:
    """A peer that comes when the others are at work."""

    def __init__(self, peers: Swarm) -> None:
        self._peers, self._stack = peers, contextlib.AsyncExitStack()

    async def join(self, what: MemoryShelf) -> Place:
        return await self._peers.add(WeightServer(what).serve, self._stack)

    async def leave(self) -> None:
        await self._stack.aclose()


async def stall(channel: Channel) -> None:
    """Says that it has everything and then sends nothing."""
    message, _ = await channel.receive()
    assert isinstance(message, GetHoldings)
    await channel.send(Holdings(message.call, len(MANIFEST), pack_held([True] * len(TENSORS))))
    while True:
        await channel.receive()


def test_a_peer_that_stalls_is_left_after_a_deadline() -> None:
    async def work() -> float:
        store = MemoryStore()
        async with swarm(stall, shelf()) as peers:
            report = await fetch(peers, store).run()
        check(store)
        assert set(report.fetched_bytes) == {peers.places[1].peer}
        return asyncio.get_running_loop().time()

    assert run_virtual(work()) < 2 * STALL_S + 10


def test_only_stallers_are_an_error_in_the_end() -> None:
    async def work() -> None:
        async with swarm(stall, stall) as peers:
            with pytest.raises(WeightsMissing, match="sent nothing for"):
                await fetch(peers, MemoryStore()).run()

    run_virtual(work(), timeout_s=600)


def test_a_peer_that_vanishes_is_replaced_where_it_was() -> None:
    async def work() -> None:
        store = MemoryStore()
        config = WeightsConfig(rate_bytes_per_s=1 << 20)
        async with swarm(shelf(), config=config) as peers:
            fetching = asyncio.create_task(fetch(peers, store, BIG).run())
            await until_begun(store, 500_001)
            peers.network.crash(peers.places[0].peer)
            late = Late(peers)
            await late.join(shelf())
            report = await fetching
            await late.leave()
        check(store, BIG)
        assert len(report.fetched_bytes) == 2
        assert sum(report.fetched_bytes.values()) == len(TENSORS[BIG]), "nothing twice"

    run_virtual(work())


def test_all_gone_names_what_is_missing_and_keeps_what_came() -> None:
    async def work() -> None:
        store = MemoryStore()
        config = WeightsConfig(rate_bytes_per_s=1 << 20)
        async with swarm(shelf(), config=config) as peers:
            fetching = asyncio.create_task(fetch(peers, store, BIG).run())
            await until_begun(store, 500_001)
            peers.network.crash(peers.places[0].peer)
            with pytest.raises(WeightsMissing, match=r"1 of 1 .* tensor 5"):
                await fetching
            (draft,) = store.drafts.values()
            begun = len(draft)
            assert begun > 500_000
        async with swarm(shelf()) as again:
            report = await fetch(again, store, BIG).run()
        check(store, BIG)
        assert sum(report.fetched_bytes.values()) == len(TENSORS[BIG]) - begun

    run_virtual(work())


def test_a_draft_that_was_spoilt_on_disk_is_fetched_anew_without_blame() -> None:
    async def work() -> None:
        store = MemoryStore()
        for begun in (1000, len(TENSORS[BIG])):
            store.drafts[items(BIG)[0].content] = bytearray(begun)
            async with swarm(shelf()) as peers:
                report = await fetch(peers, store, BIG).run()
            assert report.dropped == {}
            check(store, BIG)
            store.contents.clear()

    run_virtual(work())


def test_a_stopped_download_leaves_no_task_and_no_stream_behind() -> None:
    async def work() -> None:
        store = MemoryStore()
        config = WeightsConfig(rate_bytes_per_s=1 << 20)
        async with swarm(shelf(), shelf(), config=config) as peers:
            fetching = asyncio.create_task(fetch(peers, store).run())
            await until_begun(store, 1)
            fetching.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetching
            assert not [t for t in asyncio.all_tasks() if t.get_name().startswith("weights/")]
            assert peers.network.transport(identity(99).peer).num_streams == 0

    run_virtual(work())


async def wrong_count(channel: Channel) -> None:
    await answer_pieces(channel, lambda message: (Piece(message.call), bytes(message.count - 1)))


async def wrong_call(channel: Channel) -> None:
    await answer_pieces(channel, lambda message: (Piece(message.call + 1), bytes(message.count)))


async def other_message(channel: Channel) -> None:
    await answer_pieces(channel, lambda message: (Ping(1), b""))


async def blame_us(channel: Channel) -> None:
    await answer_pieces(channel, lambda message: (Error(message.call, "config", "your flag"), b""))


async def answer_pieces(channel: Channel, answer) -> None:
    message, _ = await channel.receive()
    await channel.send(Holdings(message.call, len(MANIFEST), pack_held([True] * len(TENSORS))))
    while True:
        message, _ = await channel.receive()
        assert isinstance(message, GetPiece)
        reply, payload = answer(message)
        await channel.send(reply, *([payload] if payload else []))


@pytest.mark.parametrize("bad", [wrong_count, wrong_call, other_message, blame_us])
def test_nonsense_from_one_peer_spoils_nothing(bad) -> None:
    async def work() -> None:
        store = MemoryStore()
        async with swarm(bad, shelf(held=[3])) as peers:
            report = await fetch(peers, store, 3).run()
            check(store, 3)
            assert set(report.dropped) <= {peers.places[0].peer}
            with pytest.raises(WeightsMissing, match=r"tensor 2"):
                await fetch(peers, MemoryStore(), 2).run()

    run_virtual(work(), timeout_s=600)


def test_busy_peers_are_asked_again() -> None:
    async def work() -> FetchReport:
        config = WeightsConfig(streams_max=1)
        async with swarm(shelf(), config=config) as peers:
            blocker = await peers.dial(peers.places[0].addresses[0])
            task = asyncio.create_task(fetch(peers, MemoryStore(), 3).run())
            await asyncio.sleep(12.0)
            blocker.close()
            report = await task
            assert len(peers.dialled) > 2
            return report

    assert run_virtual(work()).num_items == 1


def test_a_slow_peer_hands_its_rest_to_an_idle_quick_one() -> None:
    """Both have the big tensor; whoever is a hundred times slower must not decide the end."""

    async def work() -> float:
        store = MemoryStore()
        slow = WeightServer(shelf(held=[BIG]), WeightsConfig(rate_bytes_per_s=64 << 10))
        quick = WeightServer(shelf(held=[2, BIG]), WeightsConfig(rate_bytes_per_s=400 << 10))
        async with swarm(slow.serve, quick.serve) as peers:
            report = await fetch(peers, store, 2, BIG).run()
        check(store, 2, BIG)
        assert set(report.fetched_bytes) == {place.peer for place in peers.places}
        return asyncio.get_running_loop().time()

    assert run_virtual(work()) < 0.8 * len(TENSORS[BIG]) / (64 << 10)


# --- asking around -------------------------------------------------------------------------


NOBODY = Place(PeerId(bytes(32)), (Address("memory", PeerId(bytes(32)), "nowhere", 1),))


def test_the_manifest_is_checked_against_the_models_name() -> None:
    async def work() -> None:
        liar = shelf()
        liar.by_hash[MODEL] = b"x" * len(MANIFEST)
        async with swarm(liar, shelf()) as peers:
            asked = await survey(MODEL, peers.dial, [NOBODY, *peers.places])
            assert list(asked.failures) == [NOBODY.peer]
            assert await fetch_manifest(MODEL, peers.dial, asked) == MANIFEST
        async with swarm(liar) as peers:
            asked = await survey(MODEL, peers.dial, peers.places)
            with pytest.raises(WeightsMissing, match=f"{short(peers.places[0].peer)} sent a man"):
                await fetch_manifest(MODEL, peers.dial, asked)

    run_virtual(work())


def test_a_model_that_nobody_has_is_an_error_with_reasons() -> None:
    async def work() -> None:
        async with swarm(shelf()) as peers:
            asked = await survey("0" * 32, peers.dial, peers.places)
            with pytest.raises(WeightsMissing, match="nothing of model 000"):
                await fetch_manifest("0" * 32, peers.dial, asked)
            nobody = await survey(MODEL, peers.dial, [])
            with pytest.raises(WeightsMissing, match="nobody serves this model"):
                await fetch_manifest(MODEL, peers.dial, nobody)

    run_virtual(work())


def test_tokenizer_files_must_be_agreed_on_or_named() -> None:
    async def work() -> None:
        other = FILES | {"tokenizer.json": b"another"}
        async with swarm(shelf(files=FILES), shelf(), shelf(files=FILES)) as peers:
            asked = await survey(MODEL, peers.dial, peers.places)
            files = choose_files(MODEL, asked, None)
            assert [one.name for one in files] == sorted(FILES)
        async with swarm(shelf(files=FILES), shelf(files=other)) as peers:
            asked = await survey(MODEL, peers.dial, peers.places)
            with pytest.raises(ConfigError) as caught:
                choose_files(MODEL, asked, None)
            names = [
                word.partition(".")[2] for word in caught.value.detail.split() if MODEL in word
            ]
            assert len(set(names)) == 2
            for place in peers.places:
                assert short(place.peer) in caught.value.detail
            contents = {choose_files(MODEL, asked, name)[1].content for name in names}
            assert len(contents) == 2
            with pytest.raises(WeightsMissing, match="no peer offers the tokenizer files 000"):
                choose_files(MODEL, asked, "0" * 32)

    run_virtual(work())


@pytest.mark.parametrize("name", ["../evil.json", "weights.pkl", "tokenizer.json/..", ""])
def test_files_of_other_names_are_never_taken(name: str) -> None:
    async def work() -> None:
        async with swarm(shelf(files={name: b"x"})) as peers:
            asked = await survey(MODEL, peers.dial, peers.places)
            with pytest.raises(WeightsMissing, match="no peer offers the tokenizer"):
                choose_files(MODEL, asked, None)

    run_virtual(work())
