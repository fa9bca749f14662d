"""A thin client's stream to one head server: many questions at once, answers by call."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from shoal.base.errors import (
    PeerError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    SessionLost,
    ShoalError,
    error_from_code,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.net.channel import Channel
from shoal.net.tasks import TaskSet
from shoal.wire.gossip import Beat
from shoal.wire.head import AskTokens, EndTokens, Given, StopTokens
from shoal.wire.messages import Error, Message

logger = logging.getLogger(__name__)

SILENCE_S: Final = CALL_TIMEOUT_S
"""A head server beats every second; one that is silent for so long is left."""

GIVEN_MAX: Final = 4096
"""Messages of one answer that may wait here. Whoever reads slower asks again for the rest:
a stream of many answers can't wait for one reader."""

DialHead = Callable[[PeerId], Awaitable[Channel]]
"""Opens a head channel to a peer. Raises PeerError, ProtocolError."""


class Asked:
    """One question's answers, in order."""

    def __init__(self, call: int) -> None:
        self.call = call
        self._came: asyncio.Queue[Given | ShoalError] = asyncio.Queue(GIVEN_MAX + 1)

    def put(self, message: Given) -> bool:
        """Hand over what came, unless too much waits already: then it is dropped."""
        if self._came.qsize() >= GIVEN_MAX:
            return False
        self._came.put_nowait(message)
        return True

    def fail(self, error: ShoalError) -> None:
        """The last thing that comes, behind all that waits: a place is kept for it."""
        self._came.put_nowait(error)

    async def next(self) -> Given:
        """The next tokens.

        Raises:
            ShoalError: what the server said, or what became of the stream.
        """
        found = await self._came.get()
        if isinstance(found, ShoalError):
            raise found
        return found


class HeadStream:
    """One stream to one peer; dialled when it is needed. `close` ends it."""

    def __init__(self, peer: PeerId, dial: DialHead) -> None:
        self.peer = peer
        self._dial = dial
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._calls = itertools.count(1)
        self._numbers = itertools.count(1)
        self._asked: dict[int, Asked] = {}
        self._tasks = TaskSet(f"head {short(peer)}")
        self.generation = 0
        """Rises with each stream: what the last one held is gone."""

    @property
    def is_open(self) -> bool:
        """Whether there is a stream now."""
        return self._channel is not None

    def new_number(self) -> int:
        """For a new session of this stream."""
        return next(self._numbers)

    async def open(self) -> None:
        """Dial, unless a stream is there.

        Raises:
            PeerError, ProtocolError: nobody answers, or it refuses us.
        """
        async with self._opening:
            if self._channel is not None:
                return
            self._channel = await self._dial(self.peer)
            self.generation += 1
            self._tasks.spawn(self._read(self._channel), "read")

    async def close(self) -> None:
        """End the stream and all questions."""
        await self._tasks.close()
        self._end(PeerUnreachable("the thin client was closed"))

    @asynccontextmanager
    async def ask(self, make: Callable[[int], AskTokens], payload: bytes) -> AsyncIterator[Asked]:
        """Ask what `make(call)` says; what is not read of the answer is stopped.

        Raises:
            PeerError: the stream is gone.
        """
        asked = Asked(next(self._calls))
        self._asked[asked.call] = asked
        try:
            await self._send(make(asked.call), *([payload] if payload else []))
            yield asked
        finally:
            if self._asked.pop(asked.call, None) is not None:
                self.post(StopTokens(asked.call))

    def post(self, message: StopTokens | EndTokens) -> None:
        """Send what nobody waits for; dropped if there is no stream."""
        if self._channel is not None and not self._tasks.is_closed:
            self._tasks.spawn(self._post(message), "post")

    async def _post(self, message: Message) -> None:
        try:
            await self._send(message)
        except PeerError as error:
            logger.debug("not told peer=%s reason=%s", short(self.peer), error)

    async def _send(self, message: Message, *payload: bytes) -> None:
        channel = self._channel
        if channel is None:
            raise PeerUnreachable(f"no stream to {short(self.peer)}")
        async with self._sending:
            try:
                async with asyncio.timeout(SILENCE_S):
                    await channel.send(message, *payload)
            except TimeoutError as error:
                raise PeerTimeout(f"{short(self.peer)} takes no questions") from error

    async def _read(self, channel: Channel) -> None:
        error: ShoalError = PeerUnreachable("the stream ended")
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    message, payload = await channel.receive()
                self._take(message, payload)
        except TimeoutError:
            error = PeerTimeout(f"{short(self.peer)} is silent")
        except (PeerError, ProtocolError) as failure:
            error = failure
        finally:
            channel.close()
            if self._channel is channel:
                self._end(error)

    def _take(self, message: Message, payload: memoryview) -> None:
        match message:
            case Beat():
                return
            case Given():
                if payload.nbytes or not (message.tokens or message.is_last or message.chain):
                    raise PeerMisbehaved("gives tokens that are none")
                asked = self._asked.get(message.call)
                if asked is None:
                    return  # it was stopped
                if not asked.put(message):
                    del self._asked[message.call]
                    asked.fail(SessionLost("the answer was read too slowly; the rest is dropped"))
                    self.post(StopTokens(message.call))
                elif message.is_last:
                    del self._asked[message.call]
            case Error():
                error = _as_ours(self.peer, message)
                if not message.call:
                    raise error
                failed = self._asked.pop(message.call, None)
                if failed is not None:
                    failed.fail(error)
            case _:
                raise ProtocolError(f"{type(message).__name__} on a head stream")

    def _end(self, error: ShoalError) -> None:
        self._channel = None
        asked, self._asked = self._asked, {}
        for one in asked.values():
            one.fail(error)


def _as_ours(peer: PeerId, answer: Error) -> ShoalError:
    """A head server's error, with its name in front."""
    detail = f"{short(peer)}: {answer.detail}"
    error = error_from_code(answer.code, detail, answer.retry_after_s)
    if not answer.call and not isinstance(error, PeerError | ProtocolError):
        return PeerMisbehaved(detail)
    return error
