"""The gossip directory among peers that are dead, slow, late or lying."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import AsyncExitStack

import pytest

from shoal.base.errors import ConfigError, PeerBusy, PeerRefused, PeerTimeout, PeerUnreachable
from shoal.base.ids import peer_text
from shoal.base.limits import CALL_TIMEOUT_S, RECORD_TTL_S
from shoal.discovery.exchange import answer_directory
from shoal.discovery.gossip import READER_DELAY_S, GossipConfig, GossipDirectory
from shoal.discovery.gossiper import ALONE_RECONNECT_S, DOUBT_AFTER_S, SILENCE_S, TICK_S
from shoal.discovery.neighbourhood import name_of
from shoal.discovery.spreading import BAD_MAX
from shoal.discovery.store import SUSPECT_S, RecordStore
from shoal.lab.clock import run_virtual
from shoal.net.address import Address, ListenAddress, parse_address
from shoal.net.channel import PURPOSE_GOSSIP, Channel, accept_channel, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.memory import MemoryNetwork
from shoal.net.tcp import TcpTransport
from shoal.net.transport import Stream
from shoal.wire.directory import GetRecords, Publish, Records
from shoal.wire.gossip import Offer, Suspects, Taken
from shoal.wire.messages import Message
from tests.contracts.directory_cases import (
    PASS,
    Member,
    counters,
    directory_of,
    listen,
    open_gossip,
    until,
)
from tests.unit.discovery_cases import SWARM, identity, signed

NOWHERE = Address("memory", identity(99).peer, "nowhere", 9)
READER = identity(50)


def gossip(member: Member) -> GossipDirectory:
    assert isinstance(member.directory, GossipDirectory)
    return member.directory


async def keep_silent(channel: Channel) -> None:
    await channel.receive()
    await asyncio.Event().wait()


def test_when_no_join_answers_each_is_named_with_its_reason() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        silent = await listen(network, identity(2), keep_silent)
        with pytest.raises(PeerUnreachable) as caught:
            await directory_of(network, READER, NOWHERE, silent).start()
        assert str(NOWHERE) in caught.value.detail
        assert "refuses connections" in caught.value.detail
        assert str(silent) in caught.value.detail
        assert f"within {CALL_TIMEOUT_S:g} s" in caught.value.detail

    run_virtual(work())


def test_one_join_that_answers_is_enough() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            await one.directory.publish(one.record(1))
            join = parse_address(one.address)
            async with directory_of(network, READER, NOWHERE, join) as directory:
                assert counters(directory.snapshot()) == {one.identity.peer: 1}
                assert list(directory.failures) == [NOWHERE.peer]

    run_virtual(work())


def test_a_peer_of_another_swarm_is_no_use() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            join = parse_address(one.address)
            config = GossipConfig(swarm_pass=SwarmPass.open("other"), joins=(join,))
            transport = network.transport(READER.peer)
            directory = GossipDirectory(transport, config, random.Random(1))
            with pytest.raises(PeerUnreachable, match="wrong swarm"):
                await directory.start()
            assert isinstance(directory.failures[one.identity.peer], PeerRefused)

    run_virtual(work())


def test_joining_oneself_is_no_join() -> None:
    async def work() -> None:
        own = Address("memory", READER.peer, "host", 1)
        async with directory_of(MemoryNetwork(), READER, own) as directory:
            assert directory.failures == {}

    run_virtual(work())


def test_a_late_server_is_known_to_all_at_once() -> None:
    """Three in a line: nobody but the first was ever named to the third."""

    async def work() -> None:
        network = MemoryNetwork()
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(open_gossip(network, 1))
            await one.directory.publish(one.record(1))
            two = await stack.enter_async_context(
                open_gossip(network, 2, parse_address(one.address))
            )
            await two.directory.publish(two.record(1))
            reader = await stack.enter_async_context(
                directory_of(network, READER, parse_address(one.address), is_reader=True)
            )
            await asyncio.sleep(2 * READER_DELAY_S)
            start_s = asyncio.get_running_loop().time()
            three = await stack.enter_async_context(
                open_gossip(network, 3, parse_address(two.address))
            )
            await three.directory.publish(three.record(1))
            for directory in (one.directory, two.directory, three.directory, reader):
                await until(directory, lambda found: len(found.records) == 3)
            assert asyncio.get_running_loop().time() - start_s <= 2 * TICK_S
            assert len(reader.gossiper.neighbours) == 2

    run_virtual(work())


@pytest.mark.parametrize("detect_after_s", [0.0, None], ids=["killed", "without power"])
def test_a_crash_is_noticed_and_the_server_dropped(detect_after_s: float | None) -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with AsyncExitStack() as stack:
            members = [await stack.enter_async_context(open_gossip(network, 1))]
            first = parse_address(members[0].address)
            for number in (2, 3, 4):
                members.append(await stack.enter_async_context(open_gossip(network, number, first)))
            for member in members:
                await member.directory.publish(member.record(1))
            join = parse_address(members[1].address)
            reader = await stack.enter_async_context(
                directory_of(network, READER, join, is_reader=True)
            )
            await asyncio.sleep(5)
            dead = members.pop()
            network.crash(dead.identity.peer, detect_after_s=detect_after_s)
            start_s = asyncio.get_running_loop().time()
            looking = [*(member.directory for member in members), reader]
            for directory in looking:
                await until(directory, lambda found: dead.identity.peer in found.suspects)
            suspected_s = asyncio.get_running_loop().time() - start_s
            for directory in looking:
                await until(directory, lambda found: len(found.records) == 3)
            dropped_s = asyncio.get_running_loop().time() - start_s
            assert suspected_s < (2.0 if detect_after_s == 0.0 else SILENCE_S + 5)
            assert dropped_s < 15
            for member in members:
                assert counters(member.directory.snapshot()) == {
                    bytes(other.identity.peer): 1 for other in members
                }

    run_virtual(work())


def test_a_false_suspicion_is_refuted_by_a_new_record() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with (
            open_gossip(network, 1) as one,
            open_gossip(network, 2, parse_address(one.address)) as two,
        ):
            await one.directory.publish(one.record(1))
            await two.directory.publish(two.record(1))
            liar = await open_channel(
                network.transport(READER.peer), parse_address(one.address), PURPOSE_GOSSIP, PASS
            )
            held = gossip(one).store.find(two.identity.peer)
            assert held is not None
            await liar.send(Suspects([name_of(held)]))
            async with asyncio.timeout(SUSPECT_S):
                await gossip(two).suspected()
                await two.directory.publish(two.record(2))
            found = await until(one.directory, lambda s: counters(s)[two.identity.peer] == 2)
            assert found.suspects == frozenset()
            liar.close()

    run_virtual(work())


def test_who_was_alone_finds_the_others_by_itself() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 2) as two:
            await two.directory.publish(two.record(1))
            address = two.address
        async with AsyncExitStack() as stack:
            late = directory_of(network, READER, is_reader=True)
            late.store.accept(two.record(1), 0.0)
            assert address
            await stack.enter_async_context(late)
            await asyncio.sleep(20)
            assert isinstance(late.failures[two.identity.peer], PeerUnreachable)
            again = await stack.enter_async_context(open_gossip(network, 2))
            await again.directory.publish(again.record(2))
            start_s = asyncio.get_running_loop().time()
            await until(late, lambda found: counters(found) == {again.identity.peer: 2})
            assert asyncio.get_running_loop().time() - start_s <= 3 * ALONE_RECONNECT_S

    run_virtual(work())


def test_all_addresses_of_a_peer_are_tried() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one, open_gossip(network, 2) as two:
            bad = f"memory://{peer_text(two.identity.peer)}@nowhere:1"
            await two.directory.publish(two.record(1, addresses=[bad, two.address]))
            gossip(one).store.accept(gossip(two).store.snapshot().records[0].data, 0.0)
            await one.directory.publish(one.record(1))
            assert one.identity.peer in counters(two.directory.snapshot())

    run_virtual(work())


def test_a_liar_can_only_waste_its_own_breath() -> None:
    alice, mallory = identity(1), identity(2)
    true = signed(alice, 1)
    forged = bytearray(signed(alice, 9))
    forged[-1] ^= 1

    async def lie(channel: Channel) -> None:
        question, _ = await channel.receive()
        assert isinstance(question, GetRecords)
        await channel.send(Records(question.call, [bytes(forged), b"junk", true]))
        await channel.receive()

    async def work() -> None:
        network = MemoryNetwork()
        liar = await listen(network, mallory, lie)
        async with directory_of(network, READER, liar) as directory:
            assert counters(directory.snapshot()) == {alice.peer: 1}

    run_virtual(work())


def test_a_client_reads_a_second_directory() -> None:
    """The only join hides a server; one that it names does not."""
    mallory = identity(2)

    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one, open_gossip(network, 3) as three:
            await one.directory.publish(one.record(1))
            await three.directory.publish(three.record(1))
            gossip(one).store.accept(three.record(1), 0.0)
            store = RecordStore(SWARM)
            store.accept(one.record(1), 0.0)

            async def hide(channel: Channel) -> None:
                while True:
                    question, _ = await channel.receive()
                    assert isinstance(question, GetRecords | Publish)
                    await channel.send(answer_directory(store, question, 0.0))

            liar = await listen(network, mallory, hide)
            async with directory_of(network, READER, liar, is_reader=True) as directory:
                assert set(counters(directory.snapshot())) == {
                    one.identity.peer,
                    three.identity.peer,
                }

    run_virtual(work())


def test_a_silent_peer_costs_one_deadline_and_holds_nobody_up() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        silent = await listen(network, identity(2), keep_silent)
        async with open_gossip(network, 1) as one:
            await one.directory.publish(one.record(1))
            join = parse_address(one.address)
            async with directory_of(network, READER, silent, join) as directory:
                assert asyncio.get_running_loop().time() == pytest.approx(CALL_TIMEOUT_S)
                assert counters(directory.snapshot()) == {one.identity.peer: 1}
                assert isinstance(directory.failures[identity(2).peer], PeerTimeout)

    run_virtual(work())


def test_a_restarted_peer_whose_clock_went_back_is_told() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            first = parse_address(one.address)
            async with open_gossip(network, 2, first) as two:
                await two.directory.publish(two.record(1))
            async with open_gossip(network, 2, first) as again:
                with pytest.raises(ConfigError, match="clock go back"):
                    await again.directory.publish(again.record(1, boot_ms=999))
                await again.directory.publish(again.record(1, boot_ms=1_001))

    run_virtual(work())


def test_nobody_publishes_for_another() -> None:
    async def work() -> None:
        with pytest.raises(ConfigError, match="own"):
            await directory_of(MemoryNetwork(), READER).publish(signed(identity(1)))

    run_virtual(work())


def test_a_bug_in_a_tick_is_logged_and_the_next_tick_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Faulty(random.Random):
        def uniform(self, *args: float) -> float:
            raise RuntimeError("a bug")

    async def work() -> None:
        network = MemoryNetwork()
        transport = network.transport(identity(1).peer)
        directory = GossipDirectory(transport, GossipConfig(swarm_pass=PASS), Faulty())
        async with directory:
            await asyncio.sleep(1.5 * TICK_S)

    with caplog.at_level(logging.ERROR):
        run_virtual(work())
    assert caplog.text.count("gossip tick failed") == 2
    caplog.clear()


def test_a_polite_leaver_is_not_suspected() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            async with open_gossip(network, 2, parse_address(one.address)) as two:
                await one.directory.publish(one.record(1))
                await two.directory.publish(two.record(1))
                await two.directory.publish(two.record(2, state="offline", addresses=[]))
                assert counters(one.directory.snapshot()) == {one.identity.peer: 1}
            await asyncio.sleep(30)
            assert gossip(one).gossiper.around.counts["accused"] == 0

    run_virtual(work())


def test_close_is_idempotent_and_what_is_known_stays() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            await one.directory.publish(one.record(1))
            directory = directory_of(network, READER, parse_address(one.address))
            await directory.start()
            await asyncio.sleep(2)
            await directory.close()
            await directory.close()
            assert counters(directory.snapshot()) == {one.identity.peer: 1}
            await asyncio.sleep(1)
            assert READER.peer not in gossip(one).gossiper.neighbours

    run_virtual(work())


async def mallory_at(network: MemoryNetwork, one: Member) -> Channel:
    """A gossip stream of a peer that is up to no good."""
    transport = network.transport(identity(66).peer)
    return await open_channel(transport, parse_address(one.address), PURPOSE_GOSSIP, PASS)


def test_who_is_turned_away_does_not_come_back_at_once_nor_accuse() -> None:
    dialled = 0

    async def work() -> None:
        network = MemoryNetwork()
        who = identity(2)

        async def refuse(channel: Channel) -> None:
            nonlocal dialled
            dialled += 1
            await channel.refuse(PeerBusy("enough neighbours"))

        address = await listen(network, who, refuse)
        async with directory_of(network, READER) as directory:
            directory.store.accept(signed(who, addresses=[str(address)]), 0.0, DOUBT_AFTER_S + 1)
            await asyncio.sleep(60)
            assert 2 <= dialled <= 15
            assert directory.snapshot().suspects == frozenset()
            assert len(directory.snapshot().records) == 1

    run_virtual(work())


async def send_without_end(channel: Channel, message: Message) -> None:
    while True:
        await channel.send(message)


def test_who_hands_over_bad_records_is_told_and_shunned() -> None:
    forged = bytearray(signed(identity(1), 9))
    forged[-1] ^= 1

    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            mallory = await mallory_at(network, one)
            await mallory.send(Records(7, [bytes(forged)] * (BAD_MAX - 1)))
            assert (await mallory.receive())[0] == Taken(7)
            await mallory.send(Records(0, [b"junk"]))
            error, _ = await mallory.receive()
            assert "bad records" in getattr(error, "detail", "")
            with pytest.raises(PeerUnreachable):
                await mallory.receive()
            again = await mallory_at(network, one)
            assert "bad records" in getattr((await again.receive())[0], "detail", "")
            assert gossip(one).gossiper.around.counts["protocol"] == BAD_MAX

    run_virtual(work())


def test_what_has_no_place_on_a_gossip_stream_ends_it() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            mallory = await mallory_at(network, one)
            await mallory.send(GetRecords(1))
            error, _ = await mallory.receive()
            assert "GetRecords" in getattr(error, "detail", "")

    run_virtual(work())


def test_a_neighbour_that_does_not_read_is_dropped() -> None:
    async def work() -> None:
        network = MemoryNetwork(buffer_bytes=1000)
        async with open_gossip(network, 1) as one:
            for number in range(100, 200):
                gossip(one).store.accept(signed(identity(number)), 0.0)
            mallory = await mallory_at(network, one)
            with pytest.raises(PeerUnreachable):
                await send_without_end(mallory, Offer([], bytes(range(64))))
            assert mallory.peer not in gossip(one).gossiper.neighbours

    run_virtual(work())


def test_a_record_is_not_reborn_where_it_is_handed_on() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_gossip(network, 1) as one:
            gossip(one).store.accept(signed(identity(9)), 0.0, RECORD_TTL_S - 0.5)
            join = parse_address(one.address)
            async with directory_of(network, READER, join, is_reader=True) as directory:
                assert identity(9).peer in counters(directory.snapshot())
                await asyncio.sleep(0.6)
                assert directory.snapshot().records == ()

    run_virtual(work())


def test_over_tcp() -> None:
    async def work() -> None:
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            transports = [TcpTransport(identity(number)) for number in (1, 2)]
            for transport in transports:
                stack.push_async_callback(transport.close)
            alice = GossipDirectory(transports[0], GossipConfig(swarm_pass=PASS), random.Random(1))

            async def serve(stream: Stream) -> None:
                channel, purpose = await accept_channel(stream, PASS)
                if purpose == PURPOSE_GOSSIP:
                    await alice.serve(channel)
                else:
                    question, _ = await channel.receive()
                    assert isinstance(question, GetRecords)
                    await channel.send(answer_directory(alice.store, question, 0.0))
                    await channel.receive()

            where = ListenAddress("tcp", "127.0.0.1", 0)
            address = (await transports[0].listen(where, serve)).address
            await stack.enter_async_context(alice)
            config = GossipConfig(swarm_pass=PASS, joins=(address,))
            bob = GossipDirectory(transports[1], config, random.Random(2))
            await stack.enter_async_context(bob)
            await bob.publish(signed(identity(2)))
            assert alice.store.find(identity(2).peer) is not None

    asyncio.run(work())
