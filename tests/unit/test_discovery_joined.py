"""The joined directory among peers that are dead, slow, late or lying."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import AsyncExitStack

import pytest

from shoal.base.errors import ConfigError, PeerRefused, PeerTimeout, PeerUnreachable
from shoal.base.ids import peer_text
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.discovery.joined import ASKED_MAX, JoinConfig, JoinedDirectory
from shoal.discovery.store import RecordStore
from shoal.lab.clock import run_virtual
from shoal.net.address import Address, ListenAddress, parse_address
from shoal.net.channel import Channel, accept_channel
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.memory import MemoryNetwork
from shoal.net.tcp import TcpTransport
from shoal.net.transport import Stream
from shoal.wire.messages import GetRecords, Records
from tests.contracts.directory_cases import (
    PASS,
    PERIOD_S,
    Member,
    answer_from,
    counters,
    listen,
    open_joined,
)
from tests.unit.discovery_cases import SWARM, identity, signed

NOWHERE = Address("memory", identity(99).peer, "nowhere", 9)


def joined(member: Member) -> JoinedDirectory:
    assert isinstance(member.directory, JoinedDirectory)
    return member.directory


def client(network: MemoryNetwork, *joins: Address, number: int = 50) -> JoinedDirectory:
    """A directory of a peer that never publishes nor answers."""
    config = JoinConfig(swarm_pass=PASS, joins=joins, period_s=PERIOD_S)
    transport = network.transport(identity(number).peer)
    return JoinedDirectory(transport, config, random.Random(number))


async def keep_silent(channel: Channel) -> None:
    await channel.receive()
    await asyncio.Event().wait()


def test_when_no_join_answers_each_is_named_with_its_reason() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        silent = await listen(network, identity(2), keep_silent)
        with pytest.raises(PeerUnreachable) as caught:
            await client(network, NOWHERE, silent).start()
        assert str(NOWHERE) in caught.value.detail
        assert "refuses connections" in caught.value.detail
        assert str(silent) in caught.value.detail
        assert f"within {CALL_TIMEOUT_S:g} s" in caught.value.detail

    run_virtual(work())


def test_one_join_that_answers_is_enough() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_joined(network, 1) as one:
            await one.directory.publish(one.record(1))
            async with client(network, NOWHERE, parse_address(one.address)) as directory:
                assert counters(directory.snapshot()) == {one.identity.peer: 1}
                assert list(directory.failures) == [NOWHERE.peer]

    run_virtual(work())


def test_a_peer_of_another_swarm_is_no_use() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_joined(network, 1) as one:
            join = parse_address(one.address)
            config = JoinConfig(swarm_pass=SwarmPass.open("other"), joins=(join,))
            transport = network.transport(identity(50).peer)
            directory = JoinedDirectory(transport, config, random.Random(1))
            with pytest.raises(PeerUnreachable, match="wrong swarm"):
                await directory.start()
            assert isinstance(directory.failures[one.identity.peer], PeerRefused)

    run_virtual(work())


def test_joining_oneself_is_no_join() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        own = Address("memory", identity(50).peer, "host", 1)
        async with client(network, own) as directory:
            assert directory.failures == {}

    run_virtual(work())


def test_a_peer_that_is_learned_of_gets_our_record_at_once() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(open_joined(network, 1))
            first = parse_address(one.address)
            two = await stack.enter_async_context(open_joined(network, 2, first))
            await two.directory.publish(two.record(1))
            three = await stack.enter_async_context(open_joined(network, 3, first))
            start_s = asyncio.get_running_loop().time()
            await three.directory.publish(three.record(1))
            assert three.identity.peer in counters(two.directory.snapshot())
            assert asyncio.get_running_loop().time() == start_s, "without waiting for a round"

    run_virtual(work())


def test_two_halves_that_know_one_common_peer_find_each_other() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(open_joined(network, 1))
            two = await stack.enter_async_context(
                open_joined(network, 2, parse_address(one.address))
            )
            await one.directory.publish(one.record(1))
            await two.directory.publish(two.record(1))
            three = await stack.enter_async_context(
                open_joined(network, 3, parse_address(two.address))
            )
            assert counters(three.directory.snapshot()) == {
                one.identity.peer: 1,
                two.identity.peer: 1,
            }

    run_virtual(work())


def test_a_peer_that_was_down_gets_our_record_in_a_later_round() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        store = RecordStore(SWARM)
        late = identity(2)
        place = Address("memory", late.peer, "host", 7)
        async with open_joined(network, 1) as one:
            await one.directory.publish(one.record(1))
            joined(one).store.accept(signed(late, addresses=[str(place)]), 0.0)
            await joined(one).refresh()
            assert isinstance(joined(one).failures[late.peer], PeerUnreachable)
            await listen(network, late, lambda channel: answer_from(store, channel), port=7)
            await asyncio.sleep(PERIOD_S + 1)
            assert store.find(one.identity.peer) is not None
            assert joined(one).failures == {}

    run_virtual(work())


def test_failures_of_peers_that_are_gone_are_forgotten() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_joined(network, 1) as one:
            dead = identity(2)
            joined(one).store.accept(signed(dead, ttl_s=100.0), 0.0)
            await joined(one).refresh()
            assert list(joined(one).failures) == [dead.peer]
            await asyncio.sleep(100.0 + PERIOD_S)
            assert joined(one).failures == {}

    run_virtual(work())


def test_all_addresses_of_a_peer_are_tried() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_joined(network, 1) as one, open_joined(network, 2) as two:
            bad = f"memory://{peer_text(two.identity.peer)}@nowhere:1"
            await two.directory.publish(two.record(1, addresses=[bad, two.address]))
            joined(one).store.accept(joined(two).store.snapshot().records[0].data, 0.0)
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
        async with client(network, liar) as directory:
            assert counters(directory.snapshot()) == {alice.peer: 1}

    run_virtual(work())


def test_a_silent_peer_costs_one_deadline_and_holds_nobody_up() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        silent = await listen(network, identity(2), keep_silent)
        async with open_joined(network, 1) as one:
            await one.directory.publish(one.record(1))
            async with client(network, silent, parse_address(one.address)) as directory:
                assert asyncio.get_running_loop().time() == pytest.approx(CALL_TIMEOUT_S)
                assert counters(directory.snapshot()) == {one.identity.peer: 1}
                assert isinstance(directory.failures[identity(2).peer], PeerTimeout)

    run_virtual(work())


def test_only_some_of_many_servers_are_asked() -> None:
    asked: set[bytes] = set()

    async def work() -> None:
        network = MemoryNetwork()

        async def start(who: Identity) -> bytes:
            async def answer(channel: Channel) -> None:
                asked.add(who.peer)
                await answer_from(RecordStore(SWARM), channel)

            address = await listen(network, who, answer)
            return signed(who, addresses=[str(address)])

        directory = client(network)
        for number in range(100, 120):
            directory.store.accept(await start(identity(number)), 0.0)
        await directory.refresh()
        assert len(asked) == ASKED_MAX

    run_virtual(work())


def test_a_restarted_peer_whose_clock_went_back_is_told() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_joined(network, 1) as one:
            first = parse_address(one.address)
            async with open_joined(network, 2, first) as two:
                await two.directory.publish(two.record(1))
            async with open_joined(network, 2, first) as again:
                with pytest.raises(ConfigError, match="clock go back"):
                    await again.directory.publish(again.record(1, boot_ms=999))
                await again.directory.publish(again.record(1, boot_ms=1_001))

    run_virtual(work())


def test_nobody_publishes_for_another() -> None:
    async def work() -> None:
        with pytest.raises(ConfigError, match="own"):
            await client(MemoryNetwork()).publish(signed(identity(1)))

    run_virtual(work())


def test_a_bug_in_a_round_is_logged_and_the_next_round_comes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Faulty(random.Random):
        def sample(self, *args: object, **options: object) -> list[object]:
            raise RuntimeError("a bug")

    async def work() -> None:
        network = MemoryNetwork()
        config = JoinConfig(swarm_pass=PASS, period_s=PERIOD_S)
        transport = network.transport(identity(1).peer)
        directory = JoinedDirectory(transport, config, Faulty())
        directory._rounds = asyncio.create_task(directory._repeat())
        await asyncio.sleep(2.5 * PERIOD_S)
        await directory.close()

    with caplog.at_level(logging.ERROR):
        run_virtual(work())
    assert caplog.text.count("directory round failed") == 2
    caplog.clear()


def test_close_is_idempotent_and_what_is_known_stays() -> None:
    async def work() -> None:
        network = MemoryNetwork()
        async with open_joined(network, 1) as one:
            await one.directory.publish(one.record(1))
            directory = client(network, parse_address(one.address))
            await directory.start()
            await directory.close()
            await directory.close()
            assert counters(directory.snapshot()) == {one.identity.peer: 1}

    run_virtual(work())


def test_over_tcp_with_a_deadline_for_the_whole() -> None:
    async def work() -> None:
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            alice, bob = TcpTransport(identity(1)), TcpTransport(identity(2))
            stack.push_async_callback(alice.close)
            stack.push_async_callback(bob.close)
            store = RecordStore(SWARM)

            async def serve(stream: Stream) -> None:
                channel, _ = await accept_channel(stream, PASS)
                await answer_from(store, channel)

            listener = await alice.listen(ListenAddress("tcp", "127.0.0.1", 0), serve)
            config = JoinConfig(swarm_pass=PASS, joins=(listener.address,))
            directory = JoinedDirectory(bob, config, random.Random(1))
            await stack.enter_async_context(directory)
            await directory.publish(signed(identity(2)))
            assert store.find(bob.peer) is not None

    asyncio.run(work())


def test_a_period_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="period"):
        JoinConfig(swarm_pass=PASS, period_s=0.0)
