"""What the in-memory transport adds to the contract: crashes, held paths, odd deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from shoal.base.errors import (
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
)
from shoal.base.ids import PeerId
from shoal.base.limits import DIAL_TIMEOUT_S
from shoal.lab.clock import run_virtual
from shoal.net.address import Address, parse_listen
from shoal.net.conditions import DialFate, FrameFate, Held, PerfectConditions
from shoal.net.memory import MemoryListener, MemoryNetwork
from shoal.net.memory_stream import MemoryStream
from shoal.net.transport import Stream

ALICE = PeerId(b"a" * 32)
BOB = PeerId(b"b" * 32)


class Scripted(PerfectConditions):
    """Fates from a list, then perfect ones."""

    def __init__(self, *fates: FrameFate | Held, dial: DialFate = DialFate()) -> None:  # noqa: B008
        self.fates = list(fates)
        self.dial_fate = dial
        self.changed: list[Callable[[], None]] = []

    def dial(self, dialer: PeerId, listener: PeerId) -> DialFate:
        return self.dial_fate

    def frame(self, sender: PeerId, receiver: PeerId, frame_bytes: int) -> FrameFate | Held:
        if self.fates:
            fate = self.fates[0]
            if not isinstance(fate, Held):
                self.fates.pop(0)
            return fate
        return FrameFate()

    def subscribe(self, changed: Callable[[], None]) -> None:
        self.changed.append(changed)


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def pair(network: MemoryNetwork) -> tuple[MemoryStream, Stream, MemoryListener]:
    """Alice's end, Bob's end, Bob's listener."""
    accepted: asyncio.Queue[Stream] = asyncio.Queue()

    async def handler(stream: Stream) -> None:
        accepted.put_nowait(stream)
        await asyncio.Event().wait()

    listener = await network.transport(BOB).listen(parse_listen("memory://bob:0"), handler)
    near = await network.transport(ALICE).dial(listener.address)
    return near, await accepted.get(), listener


async def headers(stream: Stream, count: int) -> list[bytes]:
    return [bytes((await stream.receive()).header) for _ in range(count)]


def test_frames_pass_both_ways_and_are_copied() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork())
        payload = bytearray(b"xyz")
        await near.send(b"one", payload, memoryview(b"more"))
        payload[:] = b"???"
        frame = await far.receive()
        assert (bytes(frame.header), bytes(frame.payload)) == (b"one", b"xyzmore")
        await far.send(b"two")
        assert await headers(near, 1) == [b"two"]
        assert (near.peer, far.peer) == (BOB, ALICE)

    asyncio.run(scenario())
    run_virtual(scenario)


def test_a_full_buffer_makes_the_sender_wait_until_it_is_read() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork(buffer_bytes=100))
        await near.send(b"x", b"y" * 200)
        blocked = asyncio.create_task(near.send(b"z"))
        await asyncio.sleep(1)
        assert not blocked.done()
        await far.receive()
        await blocked
        assert await headers(far, 1) == [b"z"]

    run_virtual(scenario)


def test_close_delivers_what_was_sent_then_ends_the_other_side() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork())
        await near.send(b"last words")
        near.close()
        near.close()
        assert await headers(far, 1) == [b"last words"]
        for call in (far.receive(), far.send(b"x"), near.receive(), near.send(b"x")):
            with pytest.raises(PeerUnreachable):
                await call

    run_virtual(scenario)


def test_delays_keep_order() -> None:
    async def scenario() -> None:
        fates = [FrameFate(arrivals_s=(delay_s,)) for delay_s in (0.5, 0.1, 0.2)]
        near, far, _ = await pair(MemoryNetwork(Scripted(*fates)))
        for name in (b"1", b"2", b"3"):
            await near.send(name)
        assert await headers(far, 3) == [b"1", b"2", b"3"]
        assert now_s() == pytest.approx(0.5)

    run_virtual(scenario)


def test_lost_and_repeated_frames() -> None:
    async def scenario() -> None:
        fates = [FrameFate(arrivals_s=()), FrameFate(arrivals_s=(0.1, 0.3)), FrameFate()]
        near, far, _ = await pair(MemoryNetwork(Scripted(*fates)))
        for name in (b"1", b"2", b"3"):
            await near.send(name)
        assert await headers(far, 3) == [b"2", b"3", b"2"]

    run_virtual(scenario)


def test_a_flipped_byte_in_the_prefix_ends_the_stream() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork(Scripted(FrameFate(corrupt_byte=3))))
        await near.send(b"1")
        with pytest.raises(ProtocolError):
            await far.receive()
        with pytest.raises(PeerUnreachable):
            await near.receive()

    run_virtual(scenario)


def test_reset_breaks_both_ends() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork(Scripted(FrameFate(is_reset=True))))
        await near.send(b"1")
        for end in (near, far):
            with pytest.raises(PeerUnreachable, match="reset"):
                await end.receive()

    run_virtual(scenario)


def test_held_frames_go_on_when_the_path_is_back() -> None:
    async def scenario() -> None:
        conditions = Scripted(Held(break_after_s=10))
        near, far, _ = await pair(MemoryNetwork(conditions))
        await near.send(b"1")
        await near.send(b"2")
        await asyncio.sleep(9)
        conditions.fates.clear()
        conditions.changed[0]()
        await asyncio.sleep(9)
        assert await headers(far, 2) == [b"1", b"2"]
        assert near.end is None

    run_virtual(scenario)


def test_a_path_held_for_too_long_breaks_both_ends() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork(Scripted(Held(break_after_s=10))))
        await near.send(b"1")
        for end in (near, far):
            with pytest.raises(PeerUnreachable, match="10 s"):
                await end.receive()
        assert now_s() == pytest.approx(10)

    run_virtual(scenario)


def test_an_end_that_does_not_get_through_is_noticed_all_the_same() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork(Scripted(Held(break_after_s=10))))
        near.close()
        with pytest.raises(PeerUnreachable, match="10 s"):
            await far.receive()

    run_virtual(scenario)


@pytest.mark.parametrize("detect_after_s", [0.0, 2.5])
def test_a_crash_breaks_streams_after_the_detection_time(detect_after_s: float) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        near, far, listener = await pair(network)
        network.crash(BOB, detect_after_s=detect_after_s)
        with pytest.raises(PeerUnreachable):
            await far.send(b"from the dead")
        with pytest.raises(PeerUnreachable):
            await near.receive()
        assert now_s() == pytest.approx(detect_after_s)
        with pytest.raises(PeerUnreachable):
            await network.transport(ALICE).dial(listener.address)

    run_virtual(scenario)


def test_a_silent_crash_swallows_everything_until_the_peer_is_back() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        near, _, listener = await pair(network)
        network.crash(BOB, detect_after_s=None)
        await near.send(b"hello?")
        with pytest.raises(PeerTimeout):
            await network.transport(ALICE).dial(listener.address)
        assert near.end is None
        again = network.transport(BOB)
        with pytest.raises(PeerUnreachable):
            await near.receive()
        with pytest.raises(PeerUnreachable):
            await network.transport(ALICE).dial(listener.address)
        assert again.num_streams == 0

    run_virtual(scenario)


@pytest.mark.parametrize(
    ("fate", "error", "after_s"),
    [
        (DialFate(kind="refused", delay_s=0.2), PeerUnreachable, 0.2),
        (DialFate(kind="black_hole"), PeerTimeout, DIAL_TIMEOUT_S),
        (DialFate(delay_s=60), PeerTimeout, DIAL_TIMEOUT_S),
    ],
)
def test_dials_that_fail(fate: DialFate, error: type[Exception], after_s: float) -> None:
    async def scenario() -> None:
        with pytest.raises(error):
            await pair(MemoryNetwork(Scripted(dial=fate)))
        assert now_s() == pytest.approx(after_s)

    run_virtual(scenario)


def test_a_wrong_identity_is_refused() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        _, _, listener = await pair(network)
        wrong = Address("memory", ALICE, listener.address.host, listener.address.port)
        with pytest.raises(PeerMisbehaved):
            await network.transport(ALICE).dial(wrong)

    run_virtual(scenario)


def test_closing_a_listener_ends_its_streams_and_handlers() -> None:
    async def scenario() -> None:
        network = MemoryNetwork()
        near, far, listener = await pair(network)
        await listener.close()
        for end in (near, far):
            with pytest.raises(PeerUnreachable):
                await end.receive()
        assert len(asyncio.all_tasks()) == 1
        assert network.transport(ALICE).num_streams == network.transport(BOB).num_streams == 0

    run_virtual(scenario)


def test_a_failing_handler_is_logged_and_closes_its_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        network = MemoryNetwork()

        async def handler(stream: Stream) -> None:
            raise ValueError("broken handler")

        listener = await network.transport(BOB).listen(parse_listen("memory://bob:7"), handler)
        near = await network.transport(ALICE).dial(listener.address)
        with pytest.raises(PeerUnreachable):
            await near.receive()

    run_virtual(scenario)
    assert "broken handler" in caplog.text


def test_a_cancelled_receive_loses_nothing() -> None:
    async def scenario() -> None:
        near, far, _ = await pair(MemoryNetwork())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await far.receive()
        await near.send(b"1")
        assert await headers(far, 1) == [b"1"]

    run_virtual(scenario)
