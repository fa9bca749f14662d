"""What every Transport does: one suite, run on each implementation."""

from __future__ import annotations

import array
import asyncio
import random

import pytest

from shoal.base.errors import ConfigError, MessageTooLarge, PeerMisbehaved, PeerUnreachable
from shoal.base.limits import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX
from shoal.net.address import Address, ListenAddress
from shoal.net.identity import Identity
from shoal.net.transport import Stream
from tests.contracts.transport_cases import KINDS, Kind, open_pair, run

pytestmark = pytest.mark.parametrize("kind", KINDS)

MIB = 1 << 20


async def echo(stream: Stream) -> None:
    while True:
        frame = await stream.receive()
        await stream.send(frame.header, frame.payload)


async def take(stream: Stream, count: int) -> list[bytes]:
    """The headers of the next `count` frames."""
    return [bytes((await stream.receive()).header) for _ in range(count)]


def number(index: int) -> bytes:
    return index.to_bytes(4, "little")


def test_both_sides_know_who_the_other_is(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            assert pair.near.peer == pair.near_identity.peer == far.peer
            assert pair.far.peer == pair.far_identity.peer == near.peer
            assert pair.listener.address.peer == pair.far.peer
            assert pair.listener.address.port != 0

    run(work())


def test_a_listener_knows_where_its_peer_is(kind: Kind) -> None:
    """After its end, too."""

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            assert far.remote == "127.0.0.1"
            near.close()
            with pytest.raises(PeerUnreachable):
                await far.receive()
            assert far.remote == "127.0.0.1"

    run(work())


def test_frames_come_back_from_an_echo(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            listener = await pair.far.listen(pair.where, echo)
            stream = await pair.near.dial(listener.address)
            for header, payload in ((b"", b""), (b"h", b""), (b"", b"p"), (b"head", b"x" * 70_000)):
                await stream.send(header, payload)
                frame = await stream.receive()
                assert (bytes(frame.header), bytes(frame.payload)) == (header, payload)

    run(work())


def test_payload_may_be_several_buffers_of_any_kind(kind: Kind) -> None:
    floats = array.array("f", [1.0, 2.0, 3.0])
    parts = (b"one", bytearray(b"two"), memoryview(floats), memoryview(b"x" * 40_000))

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            await near.send(memoryview(b"head"), *parts)
            frame = await far.receive()
            assert bytes(frame.header) == b"head"
            assert bytes(frame.payload) == b"onetwo" + floats.tobytes() + b"x" * 40_000

    run(work())


def test_many_frames_both_ways_keep_their_order(kind: Kind) -> None:
    rng = random.Random(1)
    sizes = [rng.choice((0, 1, 100, 5_000, 60_000)) for _ in range(400)]

    async def feed(stream: Stream) -> None:
        for index, size in enumerate(sizes):
            await stream.send(number(index), bytes(size))

    async def drink(stream: Stream) -> None:
        for index, size in enumerate(sizes):
            frame = await stream.receive()
            assert bytes(frame.header) == number(index)
            assert len(frame.payload) == size

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            async with asyncio.TaskGroup() as group:
                for task in (feed(near), drink(near), feed(far), drink(far)):
                    group.create_task(task)

    run(work())


def test_big_frame_arrives_whole(kind: Kind) -> None:
    payload = random.Random(2).randbytes(8 * MIB)

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            sending = asyncio.create_task(near.send(b"big", payload))
            frame = await far.receive()
            await sending
            assert frame.payload == payload

    run(work())


def test_send_waits_for_a_receiver_that_does_not_read(kind: Kind) -> None:
    """64 MiB are more than all buffers on the way hold together."""
    frames = 64

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            other_near, other_far = await pair.connect()

            async def feed() -> None:
                for index in range(frames):
                    await near.send(number(index), bytes(MIB))

            feeding = asyncio.create_task(feed())
            for index in range(200):  # other streams go on meanwhile
                await other_near.send(number(index))
                assert await take(other_far, 1) == [number(index)]
            assert not feeding.done()
            assert await take(far, frames) == [number(index) for index in range(frames)]
            await feeding

    run(work())


def test_a_cancelled_send_sends_all_or_nothing(kind: Kind) -> None:
    big = bytes(16 * MIB)

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            sending = asyncio.create_task(near.send(b"big", big))
            await asyncio.sleep(0)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            last = asyncio.create_task(near.send(b"last"))
            headers = await take(far, 1)
            if headers == [b"big"]:
                headers += await take(far, 1)
            assert headers[-1] == b"last"
            await last

    run(work())


def test_a_cancelled_receive_loses_nothing(kind: Kind) -> None:
    count = 300

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            rng = random.Random(3)
            got: list[bytes] = []

            async def feed() -> None:
                for index in range(count):
                    await near.send(number(index), bytes(2_000))
                    await asyncio.sleep(0)

            feeding = asyncio.create_task(feed())
            while len(got) < count:
                receiving = asyncio.create_task(far.receive())
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
                receiving.cancel()
                (outcome,) = await asyncio.gather(receiving, return_exceptions=True)
                if not isinstance(outcome, BaseException):
                    got.append(bytes(outcome.header))
            await feeding
            assert got == [number(index) for index in range(count)]

    run(work())


def test_what_was_sent_before_the_close_still_arrives(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            for index in range(50):
                await near.send(number(index), bytes(1_000))
            near.close()
            assert await take(far, 50) == [number(index) for index in range(50)]
            with pytest.raises(PeerUnreachable):
                await far.receive()

    run(work())


@pytest.mark.parametrize("closer", ["near", "far"])
def test_close_is_seen_by_both_sides(kind: Kind, closer: str) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            ends = (near, far) if closer == "near" else (far, near)
            waiting = asyncio.create_task(ends[1].receive())
            await asyncio.sleep(0)
            ends[0].close()
            ends[0].close()
            with pytest.raises(PeerUnreachable):
                await waiting
            for end in ends:
                with pytest.raises(PeerUnreachable):
                    await end.receive()
                with pytest.raises(PeerUnreachable):
                    await end.send(b"late")

    run(work())


def test_close_wakes_our_own_waiting_calls(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            near, _far = await pair.connect()

            async def feed() -> None:
                while True:
                    await near.send(b"", bytes(MIB))

            calls = [asyncio.create_task(feed()), asyncio.create_task(near.receive())]
            for _ in range(20):
                await asyncio.sleep(0)
            near.close()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [PeerUnreachable] * 2

    run(work())


def test_nobody_there(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            await pair.listener.close()
            with pytest.raises(PeerUnreachable):
                await pair.near.dial(pair.listener.address)

    run(work())


def test_an_address_of_another_transport_is_out_of_reach(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            address = pair.listener.address
            with pytest.raises(PeerUnreachable):
                await pair.near.dial(Address("pigeon", address.peer, address.host, address.port))
            with pytest.raises(ConfigError):
                await pair.far.listen(ListenAddress("pigeon", "127.0.0.1", 0), echo)

    run(work())


def test_somebody_else_answers(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            there = pair.listener.address
            wanted = Identity.generate().peer
            with pytest.raises(PeerMisbehaved):
                await pair.near.dial(Address(there.scheme, wanted, there.host, there.port))
            near, far = await pair.connect()
            await near.send(b"still here")
            assert await take(far, 1) == [b"still here"]

    run(work())


@pytest.mark.parametrize("where", ["header", "payload", "payload in parts"])
def test_too_large_is_refused_and_the_stream_goes_on(kind: Kind, where: str) -> None:
    half = bytes(PAYLOAD_BYTES_MAX // 2 + 1)
    frame = {
        "header": (bytes(HEADER_BYTES_MAX + 1),),
        "payload": (b"", bytes(PAYLOAD_BYTES_MAX + 1)),
        "payload in parts": (b"", half, half),
    }[where]

    async def work() -> None:
        async with open_pair(kind) as pair:
            near, far = await pair.connect()
            with pytest.raises(MessageTooLarge):
                await near.send(*frame)
            await near.send(b"small")
            assert await take(far, 1) == [b"small"]

    run(work())


def test_a_failing_handler_hurts_only_its_own_stream(
    kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(stream: Stream) -> None:
        if await take(stream, 1) == [b"fail"]:
            raise ValueError("a bug in a handler")
        await stream.send(b"fine")
        await stream.receive()

    async def work() -> None:
        async with open_pair(kind) as pair:
            listener = await pair.far.listen(pair.where, fail)
            bad, good = [await pair.near.dial(listener.address) for _ in range(2)]
            await bad.send(b"fail")
            with pytest.raises(PeerUnreachable):
                await bad.receive()
            await good.send(b"go")
            assert await take(good, 1) == [b"fine"]

    run(work())
    assert "a bug in a handler" in caplog.text


def test_a_handler_that_returns_closes_the_stream(kind: Kind) -> None:
    async def greet(stream: Stream) -> None:
        await stream.send(b"hello and bye")

    async def work() -> None:
        async with open_pair(kind) as pair:
            listener = await pair.far.listen(pair.where, greet)
            stream = await pair.near.dial(listener.address)
            assert await take(stream, 1) == [b"hello and bye"]
            with pytest.raises(PeerUnreachable):
                await stream.receive()

    run(work())


@pytest.mark.parametrize("closer", ["listener", "its transport", "dialler's transport"])
def test_closing_ends_streams_and_handlers(kind: Kind, closer: str) -> None:
    ended = []

    async def note_end(stream: Stream) -> None:
        try:
            await echo(stream)
        finally:
            ended.append(stream.peer)

    async def work() -> None:
        async with open_pair(kind) as pair:
            listener = await pair.far.listen(pair.where, note_end)
            stream = await pair.near.dial(listener.address)
            await stream.send(b"ping")
            assert await take(stream, 1) == [b"ping"]
            closing = {
                "listener": listener.close,
                "its transport": pair.far.close,
                "dialler's transport": pair.near.close,
            }[closer]
            await closing()
            with pytest.raises(PeerUnreachable):
                await stream.receive()
        assert ended == [pair.near.peer]

    run(work())


def test_a_closed_transport_neither_dials_nor_listens(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            await pair.near.close()
            with pytest.raises(PeerUnreachable):
                await pair.near.dial(pair.listener.address)
            with pytest.raises(ConfigError):
                await pair.near.listen(pair.where, echo)
            await pair.near.close()

    run(work())


def test_a_taken_port_is_a_configuration_error(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            taken = pair.listener.address
            with pytest.raises(ConfigError, match="choose another port"):
                await pair.near.listen(ListenAddress(kind, taken.host, taken.port), echo)

    run(work())
