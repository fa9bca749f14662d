"""Hello in both directions: who is let in, and what the other side is told."""

from __future__ import annotations

import asyncio

import pytest

from shoal.base.errors import (
    ConfigError,
    MessageTooLarge,
    PeerBusy,
    PeerMisbehaved,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
    VersionMismatch,
)
from shoal.base.limits import DETAIL_CHARS_MAX, HEADER_BYTES_MAX, PROTOCOL_VERSION
from shoal.lab.clock import run_virtual
from shoal.net.channel import (
    PURPOSE_CONTROL,
    PURPOSE_ROWS_IN,
    PURPOSE_ROWS_OUT,
    Channel,
    accept_channel,
    error_message,
    open_channel,
)
from shoal.net.membership import SwarmKey, SwarmPass, join_by_invite
from shoal.net.transport import Stream, StreamHandler
from shoal.wire.messages import Error, Hello, Message, Ping, decode, encode
from tests.contracts.transport_cases import KINDS, Kind, Pair, open_pair, run

REEF = SwarmPass.open("reef")
LAGOON = SwarmPass.open("lagoon")
GOOD_HELLO = Hello(PROTOCOL_VERSION, "reef", PURPOSE_CONTROL)


class Outcome:
    """What accept_channel made of each stream."""

    def __init__(self, swarm_pass: SwarmPass) -> None:
        self.swarm_pass = swarm_pass
        self.results: asyncio.Queue[tuple[Channel, str] | ShoalError] = asyncio.Queue()

    async def serve(self, stream: Stream) -> None:
        try:
            self.results.put_nowait(await accept_channel(stream, self.swarm_pass))
            await asyncio.Event().wait()
        except ShoalError as error:
            self.results.put_nowait(error)


async def answered(pair: Pair, handler: StreamHandler, swarm_pass: SwarmPass = REEF) -> Channel:
    """A channel to a listener with this handler."""
    listener = await pair.far.listen(pair.where, handler)
    return await open_channel(pair.near, listener.address, PURPOSE_CONTROL, swarm_pass)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("purpose", [PURPOSE_CONTROL, PURPOSE_ROWS_IN, PURPOSE_ROWS_OUT])
def test_two_of_one_swarm_talk(kind: Kind, purpose: str) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            outcome = Outcome(REEF)
            listener = await pair.far.listen(pair.where, outcome.serve)
            near = await open_channel(pair.near, listener.address, purpose, REEF)
            accepted = await outcome.results.get()
            assert not isinstance(accepted, ShoalError)
            far, heard = accepted
            assert heard == purpose
            assert (near.peer, far.peer) == (pair.far.peer, pair.near.peer)
            await near.send(Ping(1), b"pay", b"load")
            message, payload = await far.receive()
            assert (message, bytes(payload)) == (Ping(1), b"payload")
            await far.send(Ping(2))
            assert await near.receive() == (Ping(2), memoryview(b""))
            far.close()
            with pytest.raises(PeerUnreachable):
                await near.receive()

    run(work())


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_learn_of_a_wrong_swarm(kind: Kind) -> None:
    async def work() -> None:
        async with open_pair(kind) as pair:
            outcome = Outcome(LAGOON)
            with pytest.raises(PeerRefused, match="wrong swarm: 'reef'"):
                await answered(pair, outcome.serve)
            assert isinstance(await outcome.results.get(), PeerRefused)

    run(work())


def test_a_private_swarm_lets_its_members_in_only() -> None:
    key = SwarmKey.create("reef")

    def clock() -> float:
        return 0.0

    async def work() -> None:
        async with open_pair("memory") as pair:
            invite = key.invite()
            near_pass = join_by_invite(invite, pair.near_identity, clock=clock)
            far_pass = join_by_invite(invite, pair.far_identity, clock=clock)
            await answered(pair, Outcome(far_pass).serve, near_pass)
            with pytest.raises(PeerRefused, match="join it by an invite"):
                await answered(pair, Outcome(far_pass).serve, REEF)

    run(work())


def test_a_dialler_refuses_a_listener_without_membership() -> None:
    """An outsider can't pose as a server of a private swarm."""
    key = SwarmKey.create("reef")

    async def work() -> None:
        async with open_pair("memory") as pair:
            told: asyncio.Queue[Message] = asyncio.Queue()
            near_pass = join_by_invite(key.invite(), pair.near_identity, clock=lambda: 0.0)

            async def pose(stream: Stream) -> None:
                channel, _ = await accept_channel(stream, REEF)
                told.put_nowait((await channel.receive())[0])

            with pytest.raises(PeerRefused, match="membership"):
                await answered(pair, pose, near_pass)
            message = await told.get()
            assert isinstance(message, Error)
            assert (message.call, message.code) == (0, "refused")

    run(work())


BAD_ANSWERS: dict[str, tuple[bytes, type[ShoalError], str]] = {
    "another version": (
        encode(Hello(PROTOCOL_VERSION + 1, "reef", PURPOSE_CONTROL)),
        VersionMismatch,
        "upgrade",
    ),
    "another swarm": (encode(Hello(1, "lagoon", PURPOSE_CONTROL)), PeerRefused, "wrong swarm"),
    "another purpose": (encode(Hello(1, "reef", "gardening")), ProtocolError, "purpose"),
    "another message": (encode(Ping(1)), ProtocolError, "expected Hello"),
    "no message": (b"\xc1", ProtocolError, "malformed"),
    "busy": (encode(Error(0, "busy", "full", 3.0)), PeerBusy, "full"),
    "version refused": (encode(Error(0, "version", "old")), VersionMismatch, "old"),
    "an error that is not a peer's": (encode(Error(0, "config", "x")), PeerMisbehaved, "config"),
    "an unknown error": (encode(Error(0, "unheard_of", "x")), PeerMisbehaved, "unheard_of"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_dialler_takes_no_other_answer(name: str) -> None:
    answer, expected, reason = BAD_ANSWERS[name]

    async def work() -> None:
        async with open_pair("memory") as pair:

            async def reply(stream: Stream) -> None:
                await stream.receive()
                await stream.send(answer)
                await stream.receive()

            with pytest.raises(expected, match=reason) as caught:
                await answered(pair, reply)
            if name == "busy":
                assert caught.value.retry_after_s == 3.0

    run(work())


BAD_HELLOS = [
    "another version",
    "another swarm",
    "another purpose",
    "another message",
    "no message",
]


@pytest.mark.parametrize("name", BAD_HELLOS)
def test_a_listener_tells_why_it_refuses(name: str) -> None:
    hello, expected, reason = BAD_ANSWERS[name]

    async def work() -> None:
        async with open_pair("memory") as pair:
            outcome = Outcome(REEF)
            listener = await pair.far.listen(pair.where, outcome.serve)
            stream = await pair.near.dial(listener.address)
            await stream.send(hello)
            told = decode((await stream.receive()).header)
            assert isinstance(told, Error)
            assert told.code == expected.code
            assert reason in told.detail
            with pytest.raises(PeerUnreachable):
                await stream.receive()
            assert isinstance(await outcome.results.get(), expected)

    run(work())


def test_a_silent_listener_times_out() -> None:
    async def silence(stream: Stream) -> None:
        await stream.receive()
        await stream.receive()

    async def work() -> None:
        async with open_pair("memory") as pair:
            with pytest.raises(PeerTimeout, match="did not say hello"):
                await answered(pair, silence)

    run_virtual(work())


def test_a_silent_dialler_is_told_and_dropped() -> None:
    async def work() -> None:
        async with open_pair("memory") as pair:
            outcome = Outcome(REEF)
            listener = await pair.far.listen(pair.where, outcome.serve)
            stream = await pair.near.dial(listener.address)
            told = decode((await stream.receive()).header)
            assert isinstance(told, Error)
            assert told.code == "timeout"
            assert isinstance(await outcome.results.get(), PeerTimeout)

    run_virtual(work())


@pytest.mark.parametrize("side", ["dialler", "listener"])
def test_a_peer_that_leaves_during_hello(side: str) -> None:
    async def leave(stream: Stream) -> None:
        await stream.receive()

    async def work() -> None:
        async with open_pair("memory") as pair:
            if side == "listener":
                with pytest.raises(PeerUnreachable):
                    await answered(pair, leave)
                return
            outcome = Outcome(REEF)
            listener = await pair.far.listen(pair.where, outcome.serve)
            (await pair.near.dial(listener.address)).close()
            assert isinstance(await outcome.results.get(), PeerUnreachable)

    run(work())


@pytest.mark.parametrize("side", ["dialler", "listener"])
def test_a_cancelled_hello_closes_the_stream(side: str) -> None:
    async def work() -> None:
        async with open_pair("memory") as pair:
            address = pair.listener.address
            if side == "dialler":
                opening = open_channel(pair.near, address, PURPOSE_CONTROL, REEF)
                task: asyncio.Task[object] = asyncio.create_task(opening)
                stream = await pair._arrived.get()
                await stream.receive()
            else:
                stream, far = await pair.connect()
                task = asyncio.create_task(accept_channel(far, REEF))
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(PeerUnreachable):
                await stream.receive()

    run(work())


async def open_ends(pair: Pair) -> tuple[Channel, Channel]:
    """Both ends of a channel."""
    outcome = Outcome(REEF)
    near = await answered(pair, outcome.serve)
    accepted = await outcome.results.get()
    assert not isinstance(accepted, ShoalError)
    return near, accepted[0]


def test_a_message_that_is_none_can_still_be_refused() -> None:
    async def work() -> None:
        async with open_pair("memory") as pair:
            near, far = await open_ends(pair)
            await near._stream.send(b"\xc1")
            with pytest.raises(ProtocolError) as caught:
                await far.receive()
            await far.refuse(caught.value)
            message, _ = await near.receive()
            assert message == error_message(caught.value)
            with pytest.raises(PeerUnreachable):
                await near.receive()

    run(work())


def test_a_message_over_the_limit_leaves_the_channel_usable() -> None:
    async def work() -> None:
        async with open_pair("memory") as pair:
            near, far = await open_ends(pair)
            with pytest.raises(MessageTooLarge):
                await near.send(Error(1, "config", "x" * HEADER_BYTES_MAX))
            await near.send(Ping(2))
            assert (await far.receive())[0] == Ping(2)

    run(work())


def test_an_error_travels_whole() -> None:
    assert error_message(PeerBusy("full", retry_after_s=2.0), 7) == Error(7, "busy", "full", 2.0)
    long = error_message(ConfigError("x" * 5_000))
    assert isinstance(long.detail, str)
    assert len(long.detail) == DETAIL_CHARS_MAX
    assert decode(encode(long)) == long
