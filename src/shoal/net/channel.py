"""Typed messages over a stream, after a hello in both directions.

The dialler says Hello first; the other side answers with its own Hello, or with an Error
that says why not. Both check version, swarm and membership.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from shoal.base.errors import (
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
    VersionMismatch,
    error_from_code,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import DETAIL_CHARS_MAX, DIAL_TIMEOUT_S, PROTOCOL_VERSION
from shoal.net.address import Address
from shoal.net.membership import SwarmPass
from shoal.net.origin import Origin, origin_of
from shoal.net.transport import Stream, Transport
from shoal.wire.frames import Buffer
from shoal.wire.messages import Error, Hello, Message, decode, encode

logger = logging.getLogger(__name__)

PURPOSE_CONTROL: Final = "control"
"""Requests and answers between a client and a server."""

PURPOSE_ROWS_OUT: Final = "rows-out"
"""A data link on which the dialler sends rows."""

PURPOSE_ROWS_IN: Final = "rows-in"
"""A data link on which the dialler receives rows."""

PURPOSE_WEIGHTS: Final = "weights"
"""The dialler asks for tensors, files and manifests; the dialled peer hands them out."""

PURPOSE_HEAD: Final = "head"
"""The dialler sends tokens and gets tokens; the dialled peer has the model's head."""

PURPOSE_TRAINING: Final = "training"
"""The dialler sends micro-batches through blocks, forward and back."""

PURPOSE_ADAPTERS: Final = "adapters"
"""The dialler brings LoRA adapters; the dialled server keeps them for its sessions."""

PURPOSE_GOSSIP: Final = "gossip"
"""Neighbours that keep each other's directory in step."""

PURPOSE_RING: Final = "ring"
"""A machine offers itself to a ring's starter, or asks how the ring does."""

PURPOSES: Final = frozenset(
    {
        PURPOSE_CONTROL,
        PURPOSE_ROWS_OUT,
        PURPOSE_ROWS_IN,
        PURPOSE_WEIGHTS,
        PURPOSE_GOSSIP,
        PURPOSE_ADAPTERS,
        PURPOSE_RING,
        PURPOSE_HEAD,
        PURPOSE_TRAINING,
    }
)

AGENT: Final = "shoal"
"""What we call ourselves in Hello; for logs only, nothing is decided by it."""


class Channel:
    """One stream to one peer of our swarm, in messages instead of frames."""

    __slots__ = ("_stream",)

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def peer(self) -> PeerId:
        """The proven identity of the other side."""
        return self._stream.peer

    @property
    def origin(self) -> Origin | None:
        """What the peer shares with others of its address; None: nothing that tells."""
        return origin_of(self._stream.remote)

    async def send(self, message: Message, *payload: Buffer) -> None:
        """Send one message; waits while the transport's buffers are full.

        Payload buffers must not be changed afterwards. One sender at a time.

        Raises:
            PeerUnreachable: the stream is closed or broken.
            MessageTooLarge: over the frame limits; the channel stays usable.
        """
        await self._stream.send(encode(message), *payload)

    async def receive(self) -> tuple[Message, memoryview]:
        """The next message and its payload. One receiver at a time; safe to cancel.

        Raises:
            PeerUnreachable: the stream ended.
            ProtocolError: no frame (the stream is then closed) or no message of ours (it
                is not: `refuse` can still tell the peer).
        """
        while True:
            frame = await self._stream.receive()
            message = decode(frame.header)
            if not isinstance(message, Hello):  # a repeated Hello says nothing new
                return message, memoryview(frame.payload)

    async def refuse(self, error: ShoalError) -> None:
        """Tell the peer why, then close."""
        await _refuse(self._stream, error)

    def close(self) -> None:
        """End the stream at once. Idempotent, never waits."""
        self._stream.close()


def error_message(error: ShoalError, call: int = 0) -> Error:
    """The error as it travels; call 0 is the reason for closing the stream."""
    return Error(call, error.code, error.detail[:DETAIL_CHARS_MAX], error.retry_after_s)


async def open_channel(
    transport: Transport, address: Address, purpose: str, swarm_pass: SwarmPass
) -> Channel:
    """A channel to the peer at `address`, within DIAL_TIMEOUT_S.

    Raises:
        PeerUnreachable: nobody answers there, or the stream ended.
        PeerTimeout: no full handshake and hello in time.
        PeerMisbehaved: somebody else answers there, or with nonsense.
        PeerRefused: one side does not let the other in; the message says which and why.
        VersionMismatch: the peer speaks another version of the protocol.
    """
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            stream = await transport.dial(address)
            try:
                await stream.send(encode(_hello(purpose, swarm_pass)))
                await _check_answer(stream, swarm_pass)
            except BaseException:
                stream.close()
                raise
    except TimeoutError as error:
        raise PeerTimeout(f"{address} did not say hello within {DIAL_TIMEOUT_S} s") from error
    return Channel(stream)


async def _check_answer(stream: Stream, swarm_pass: SwarmPass) -> None:
    peer = short(stream.peer)
    answer = decode((await stream.receive()).header)
    if isinstance(answer, Error):
        error = error_from_code(answer.code, f"{peer}: {answer.detail}", answer.retry_after_s)
        if not isinstance(error, PeerError | ProtocolError):
            error = PeerMisbehaved(f"{peer} answered hello with {answer.code}: {answer.detail}")
        raise error
    try:
        _check_hello(answer, stream.peer, swarm_pass)
    except ShoalError as error:
        await _refuse(stream, error)
        raise


async def accept_channel(stream: Stream, swarm_pass: SwarmPass) -> tuple[Channel, str]:
    """The channel on an incoming stream and its purpose, within DIAL_TIMEOUT_S.

    A peer that is turned away is told why; the stream is then closed.

    Raises:
        PeerUnreachable, PeerTimeout, PeerRefused, VersionMismatch, ProtocolError: the peer
            left, kept silent, is not let in, or sent nonsense.
    """
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            hello = decode((await stream.receive()).header)
            purpose = _check_hello(hello, stream.peer, swarm_pass)
            await stream.send(encode(_hello(purpose, swarm_pass)))
    except TimeoutError as error:
        timeout = PeerTimeout(f"{short(stream.peer)} did not say hello")
        await _refuse(stream, timeout)
        raise timeout from error
    except ShoalError as error:
        await _refuse(stream, error)
        raise
    except BaseException:
        stream.close()
        raise
    return Channel(stream), purpose


def _hello(purpose: str, swarm_pass: SwarmPass) -> Hello:
    return Hello(PROTOCOL_VERSION, swarm_pass.name, purpose, swarm_pass.membership, AGENT)


def _check_hello(hello: Message, peer: PeerId, swarm_pass: SwarmPass) -> str:
    if not isinstance(hello, Hello):
        raise ProtocolError(f"expected Hello, got {type(hello).__name__}")
    if hello.version != PROTOCOL_VERSION:
        raise VersionMismatch(
            f"{short(peer)} speaks version {hello.version} of the protocol, we speak "
            f"{PROTOCOL_VERSION}; upgrade the older side"
        )
    swarm_pass.check(peer, hello)
    if hello.purpose not in PURPOSES:
        raise ProtocolError(f"unknown purpose {hello.purpose!r}")
    return hello.purpose


async def _refuse(stream: Stream, error: ShoalError) -> None:
    """Send the reason if the peer takes it at once, and close in any case."""
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            await stream.send(encode(error_message(error)))
    except (PeerUnreachable, TimeoutError):
        logger.debug("refusal not delivered peer=%s reason=%s", short(stream.peer), error)
    finally:
        stream.close()
