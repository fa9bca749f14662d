"""One training stream to one server: calls go out, what comes of them comes back.

A call's bytes follow its message in chunks; so do those of its answer. While calls are open
the server gives signs of life, so that a slow one is told from a dead one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from shoal.base.errors import (
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
    error_from_code,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import ALIVE_PERIOD_S
from shoal.base.training import TrainedTensors, Values
from shoal.net.channel import PURPOSE_TRAINING, Channel
from shoal.net.tasks import TaskSet
from shoal.wire.messages import Error, Message
from shoal.wire.training import (
    CHUNK_BYTES_MAX,
    PASSES_FORGOTTEN_MAX,
    Backward,
    BlockShape,
    Chunk,
    Done,
    Forget,
    Forward,
    Micro,
    PutTensors,
    TargetShape,
    Training,
)

logger = logging.getLogger(__name__)

CALLS_MAX: Final = 4
"""Calls that are open at one server: one computes, one comes, one goes, and one waits."""

SILENT_S: Final = 6.0
"""A server that owes an answer and gives no sign for this long is left."""

STUCK_S: Final = 60.0
"""The same for signs that say it computes nothing, once it has all of a call."""

UPLOAD_STUCK_S: Final = 300.0
"""A server that takes no chunk of a call for this long is left: that is below 1 kB/s."""

OWED_S: Final = 900.0
"""How long a server that has all of a call may take for the answer, whatever its signs say:
blocks of a large model on a busy CPU take minutes for a pass."""

OWED_TIMES: Final = 10.0
"""It may take so many times as long as it ever took, if that is more."""

OWED_S_MAX: Final = 7200.0

LINK_BYTES_PER_S_MIN: Final = 4096
"""Links that are slower than that are of no use: bytes under way get so much time."""

BUFFERED_BYTES_MAX: Final = 1 << 20
"""What was sent may still be so far from leaving this machine."""

TENSORS_KNOWN_MAX: Final = 64
"""Names of tensors that are remembered as put: older ones were replaced by later steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """A call's message and what belongs to it."""

    make: Callable[[int], Message]
    values: tuple[Values, ...]
    rows_bytes: int
    """Of the answer."""
    tensors_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of the call itself."""
        return sum(memoryview(values).nbytes for values in self.values)


@dataclass(slots=True, kw_only=True)
class _Call:
    future: asyncio.Future[tuple[bytes, bytes]]
    sized: Sized
    data: bytearray = field(default_factory=bytearray)
    is_answered: bool = False
    sent_s: float | None = None
    """When the last of its bytes was sent; None: some are left."""

    @property
    def num_bytes(self) -> int:
        """Of the answer."""
        return self.sized.rows_bytes + self.sized.tensors_bytes


class TrainingLink:
    """The stream to one server; dialled on first use and again after it broke."""

    def __init__(self, peer: PeerId, dial: Callable[[PeerId, str], Awaitable[Channel]]) -> None:
        self.peer = peer
        self.generation = 0
        """Counts streams: what a server kept is gone with the stream that it came on."""
        self._dial = dial
        self._channel: Channel | None = None
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count(1)
        self._passes = itertools.count(1)
        self._known: dict[bytes, asyncio.Future[None]] = {}
        self._connecting = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._room = asyncio.Semaphore(CALLS_MAX)
        self._heard_s = 0.0
        self._moved_s = 0.0
        self._steps = -1
        self._slowest_s = 0.0
        """What the slowest answer took so far, once a call was sent."""
        self._tasks = TaskSet(f"training {short(peer)}")

    def next_pass(self) -> int:
        """A number for a pass."""
        return next(self._passes)

    async def forward(self, number: int, micro: Micro, rows: Values, *, is_kept: bool) -> bytes:
        """The rows that leave.

        Raises:
            ShoalError: the server's refusal, typed, or what became of the stream.
        """
        size = memoryview(rows).nbytes
        sized = Sized(
            make=lambda call: Forward(call, number, micro, is_kept, size),
            values=(rows,),
            rows_bytes=size,
            tensors_bytes=0,
        )
        return (await self._ask(sized))[0]

    async def backward(
        self, number: int, micro: Micro, gradients: Values, rows: Values | None, tensors_bytes: int
    ) -> tuple[bytes, bytes]:
        """Gradients of the rows that entered, and of the trained tensors.

        `rows` None: the server kept the pass, it is hoped (else SessionLost).

        Raises:
            ShoalError: as `forward`.
        """
        size = memoryview(gradients).nbytes
        values = (gradients,) if rows is None else (gradients, rows)
        sized = Sized(
            make=lambda call: Backward(call, number, micro, rows is not None, size * len(values)),
            values=values,
            rows_bytes=size,
            tensors_bytes=tensors_bytes,
        )
        return await self._ask(sized)

    async def put(self, name: bytes, tensors: TrainedTensors) -> None:
        """See that the server has these tensors under this name; they travel once.

        Raises:
            ShoalError: as `forward`.
        """
        known = self._known.get(name)
        if known is None:
            known = asyncio.get_running_loop().create_future()
            known.add_done_callback(_look_at)
            self._known[name] = known
            while len(self._known) > TENSORS_KNOWN_MAX:
                del self._known[next(iter(self._known))]
            try:
                size = memoryview(tensors.values).nbytes
                sized = Sized(
                    make=lambda call: _put_message(call, name, tensors, size),
                    values=(tensors.values,),
                    rows_bytes=0,
                    tensors_bytes=0,
                )
                await self._ask(sized)
            except BaseException as error:
                self.unknown(name, known)
                failure = error if isinstance(error, ShoalError) else PeerUnreachable("gave up")
                known.set_exception(failure)
                raise
            # The stream may have broken before the call went out: then it came with the next one.
            self._known.setdefault(name, known)
            known.set_result(None)
        else:
            await asyncio.shield(known)

    def unknown(self, name: bytes, known: asyncio.Future[None] | None = None) -> None:
        """The server does not have these tensors any more."""
        if known is None or self._known.get(name) is known:
            self._known.pop(name, None)

    def forget(self, numbers: list[int]) -> None:
        """Tell the server that these passes won't come back; nothing waits for it."""
        if self._channel is not None and numbers and not self._tasks.is_closed:
            self._tasks.spawn(self._forget(numbers), "forget")

    async def close(self) -> None:
        """End the stream."""
        self._break(PeerUnreachable(f"the stream to {short(self.peer)} was closed"))
        await self._tasks.close()

    async def _forget(self, numbers: list[int]) -> None:
        channel = self._channel
        for at in range(0, len(numbers), PASSES_FORGOTTEN_MAX):
            if channel is None or channel is not self._channel:
                return
            try:
                async with self._sending:
                    await channel.send(Forget(numbers[at : at + PASSES_FORGOTTEN_MAX]))
            except PeerUnreachable:
                return  # then it is forgotten anyway

    async def _ask(self, sized: Sized) -> tuple[bytes, bytes]:
        async with self._room:
            channel = await self._connected()
            number = next(self._numbers)
            future = asyncio.get_running_loop().create_future()
            future.add_done_callback(_look_at)
            self._calls[number] = call = _Call(future=future, sized=sized)
            if len(self._calls) == 1:
                self._heard_s = self._moved_s = asyncio.get_running_loop().time()
            self._tasks.spawn(self._send(channel, number, call), "send")
            try:
                answer: tuple[bytes, bytes] = await future
                return answer
            finally:
                del self._calls[number]

    async def _send(self, channel: Channel, number: int, call: _Call) -> None:
        try:
            async with self._sending:
                now = asyncio.get_running_loop().time
                await channel.send(call.sized.make(number))
                offset = 0
                for values in call.sized.values:
                    view = memoryview(values).cast("B")
                    for at in range(0, view.nbytes, CHUNK_BYTES_MAX):
                        if call.future.cancelled():
                            # The server would wait for the rest for ever.
                            self._break(PeerUnreachable("a call was given up amid its bytes"))
                        if call.future.done():
                            return  # refused: the server drops what comes of it
                        piece = view[at : at + CHUNK_BYTES_MAX]
                        await channel.send(Chunk(number, offset), piece)
                        offset += piece.nbytes
                        self._moved_s = now()
                call.sent_s = self._moved_s = now()
        except ShoalError as error:
            if not call.future.done():
                call.future.set_exception(error)

    async def _connected(self) -> Channel:
        async with self._connecting:
            if self._channel is None:
                self._channel = channel = await self._dial(self.peer, PURPOSE_TRAINING)
                self.generation += 1
                self._tasks.spawn(self._receive(channel), "receive")
                self._tasks.spawn(self._watch(channel), "watch")
            return self._channel

    async def _receive(self, channel: Channel) -> None:
        error: ShoalError = PeerUnreachable(f"peer {short(self.peer)} closed its training stream")
        try:
            while True:
                message, payload = await channel.receive()
                self._heard_s = asyncio.get_running_loop().time()
                self._on_message(message, payload)
        except ShoalError as failure:
            error = failure
        finally:
            channel.close()
            if channel is self._channel:
                self._break(error)

    def _on_message(self, message: Message, payload: memoryview) -> None:
        now_s = self._heard_s
        match message:
            case Training():
                if message.steps != self._steps:
                    self._steps, self._moved_s = message.steps, now_s
            case Done():
                self._moved_s = now_s
                call = self._calls.get(message.call)
                if call is not None:
                    sizes = (message.rows_bytes, message.tensors_bytes)
                    if sizes != (
                        call.sized.rows_bytes,
                        call.sized.tensors_bytes,
                    ):
                        raise self._misbehaved(f"answers with {sizes} bytes")
                    call.is_answered = True
                    self._finish(call)
            case Chunk():
                call = self._calls.get(message.call)
                if call is not None:
                    self._take(call, message.offset, payload)
            case Error(call=0):
                raise error_from_code(message.code, message.detail, message.retry_after_s)
            case Error():
                call = self._calls.get(message.call)
                if call is not None and not call.future.done():
                    error = error_from_code(message.code, message.detail, message.retry_after_s)
                    call.future.set_exception(error)
            case _:
                raise ProtocolError(f"{type(message).__name__} on a training stream")

    def _take(self, call: _Call, offset: int, payload: memoryview) -> None:
        """Bytes of an answer; those that came before are dropped."""
        if offset < len(call.data):
            return
        end = offset + payload.nbytes
        if not call.is_answered or offset > len(call.data) or end > call.num_bytes:
            raise self._misbehaved("sends other bytes than it announced")
        call.data += payload
        if payload.nbytes:
            self._moved_s = self._heard_s
        self._finish(call)

    def _finish(self, call: _Call) -> None:
        if len(call.data) == call.num_bytes and not call.future.done():
            if call.sent_s is not None:
                self._slowest_s = max(self._slowest_s, self._heard_s - call.sent_s)
            rows = call.sized.rows_bytes
            call.future.set_result((bytes(call.data[:rows]), bytes(call.data[rows:])))

    def _misbehaved(self, what: str) -> PeerMisbehaved:
        return PeerMisbehaved(f"peer {short(self.peer)} {what}")

    async def _watch(self, channel: Channel) -> None:
        now = asyncio.get_running_loop().time
        while channel is self._channel:
            await asyncio.sleep(ALIVE_PERIOD_S)
            if not self._calls or channel is not self._channel:
                self._moved_s = now()
                continue
            what = self._trouble(now())
            if what is not None:
                self._break(PeerTimeout(f"peer {short(self.peer)} {what} while it owes us a pass"))

    def _trouble(self, now_s: float) -> str | None:
        """Why the server is left with what it owes; None: it is not."""
        calls = self._calls.values()
        # Signs of life wait behind a chunk of an answer.
        chunk_bytes = CHUNK_BYTES_MAX if any(call.is_answered for call in calls) else 0
        if now_s - self._heard_s > SILENT_S + chunk_bytes / LINK_BYTES_PER_S_MIN:
            return "gives no sign"
        sent = [call for call in calls if call.sent_s is not None]
        sent_bytes = min(BUFFERED_BYTES_MAX, sum(call.sized.num_bytes for call in sent))
        stuck_s = STUCK_S + sent_bytes / LINK_BYTES_PER_S_MIN if sent else UPLOAD_STUCK_S
        if now_s - self._moved_s > stuck_s:
            return "computes nothing" if sent else "takes nothing"
        owed_s = min(OWED_S_MAX, max(OWED_S, OWED_TIMES * self._slowest_s))
        for call in sent:
            for_bytes_s = (call.sized.num_bytes + call.num_bytes) / LINK_BYTES_PER_S_MIN
            if call.sent_s is not None and now_s - call.sent_s > owed_s + for_bytes_s:
                return "computes, but does not answer"
        return None

    def _break(self, error: ShoalError) -> None:
        """The stream is over: so are all calls."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        self._known.clear()
        for call in self._calls.values():
            if not call.future.done():
                call.future.set_exception(error)


def _put_message(call: int, name: bytes, tensors: TrainedTensors, size: int) -> PutTensors:
    spec = tensors.spec
    config = spec.config
    return PutTensors(
        call=call,
        name=name,
        encoding=spec.encoding,
        rank=spec.rank,
        alpha=1.0 if config is None else config.alpha,
        dropout=0.0 if config is None else config.dropout,
        use_rslora=False if config is None else config.use_rslora,
        blocks=[
            BlockShape(
                block.index,
                block.prompt_tokens,
                [TargetShape(one.target, one.inputs, one.outputs) for one in block.lora],
            )
            for block in spec.blocks
        ],
        num_bytes=size,
    )


def _look_at(future: asyncio.Future[Any]) -> None:
    """A failure that nobody waits for is no news."""
    if not future.cancelled():
        future.exception()
