"""One client's training stream: what it sends, what it left here, what it is answered.

Reading never waits for blocks to run, nor for the client to take answers: what is open of one
client is bounded instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Protocol

from shoal.base.adapters import DropoutKey
from shoal.base.backend import BackendFacts
from shoal.base.errors import (
    AdapterMissing,
    BadInput,
    MessageTooLarge,
    PeerBusy,
    PeerTimeout,
    ProtocolError,
    SessionLost,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import ALIVE_PERIOD_S
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer, Draw, PassGradients, PassWork, TrainedTensors
from shoal.net.channel import Channel, error_message
from shoal.net.tasks import first_failure
from shoal.server.training_jobs import PassJob
from shoal.server.training_kept import KeptPasses
from shoal.server.training_limits import BUSY_RETRY_S, TrainingLimits
from shoal.server.training_queue import TrainingQueue
from shoal.server.training_reading import check_pass, check_tensors, spec_of
from shoal.server.training_room import Pot, unique
from shoal.wire.messages import Message
from shoal.wire.tensors import row_bytes
from shoal.wire.training import (
    CHUNK_BYTES_MAX,
    Backward,
    Chunk,
    Done,
    Forget,
    Forward,
    Micro,
    PutTensors,
    Training,
)

logger = logging.getLogger(__name__)

IDLE_S: Final = 600.0
"""A stream without a message for this long is closed: optimisers and evaluations take a while."""

SEND_TIMEOUT_S: Final = 60.0
"""A client that takes no answer for this long is gone."""

ANSWER_BYTES_PER_S: Final = 4 << 10
"""What a client must take of an answer in the mean: slow links do."""

ANSWER_S_MAX: Final = 3600.0
"""A large one must be taken faster: a trickle would hold its memory for days."""


ANSWERS_MAX: Final = 256
"""Answers that wait to be taken; refusals, mostly, as open calls are few."""

GRADIENT_BYTES: Final = 4
"""Of one trained value: float32."""

TENSOR_SETS_MAX: Final = 256
"""Sets of trained tensors of one client, however small: a step needs one or two."""


class Host(Protocol):
    """The server, as one stream sees it."""

    limits: TrainingLimits
    queue: TrainingQueue
    kept: KeptPasses

    @property
    def facts(self) -> BackendFacts:
        """Of the backend, now."""

    @property
    def steps(self) -> int:
        """Moves whenever the server computes anything."""

    @property
    def visitors(self) -> Collection[Visitor]:
        """Whoever has a stream here."""

    def trainer(self) -> BlockTrainer:
        """Who runs passes."""

    def check_taking(self) -> None:
        """Refuse new calls."""

    def add(self, client: PeerId, job: PassJob) -> None:
        """Queue a job."""


@dataclass(slots=True, kw_only=True)
class Upload:
    """A call whose bytes are coming in."""

    message: PutTensors | Forward | Backward
    data: bytearray


class Visitor:
    """One client's stream, and what it left here. `shoal.server.training_jobs.Answers`."""

    def __init__(self, server: Host, channel: Channel) -> None:
        self._server = server
        self._channel = channel
        self._client = channel.peer
        self.origin = channel.origin
        """Where the client connects from."""
        self._uploads: dict[int, Upload] = {}
        self._sizes: dict[int, int] = {}
        """Bytes in memory of each call whose answer was not taken yet."""
        self._answer_sizes: dict[int, int] = {}
        """Bytes of each such call's answer, made or to be made."""
        self._tensors: OrderedDict[bytes, TrainedTensors] = OrderedDict()
        self._jobs: dict[int, PassJob] = {}
        self._answers: asyncio.Queue[tuple[Message, tuple[memoryview, ...]]] = asyncio.Queue()
        self._last_call = 0
        self._used_s = asyncio.get_running_loop().time()
        self._is_closed = False

    @property
    def answer_bytes(self) -> int:
        """Of the answers to open calls."""
        return sum(self._answer_sizes.values())

    @property
    def open_bytes(self) -> int:
        """Of the open calls themselves."""
        return sum(self._sizes.values())

    @property
    def tensor_bytes(self) -> int:
        """Of all trained tensors in memory: those that calls still use, too."""
        return sum(_size(one) for one in unique((*self._tensors.values(), *self._used_tensors())))

    def idle_s(self, now_s: float) -> float:
        """How long no call has been open; messages that ask for nothing don't count."""
        return 0.0 if self._sizes else now_s - self._used_s

    async def run(self) -> None:
        """Until the stream ends."""
        await first_failure(self._read(), self._write(), self._say_alive())

    def close(self) -> None:
        """Free everything. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for job in self._jobs.values():
            job.give_up()
        self._jobs.clear()
        self._uploads.clear()
        self._server.queue.forget(self._client)
        self._server.kept.forget(self._client)
        self._channel.close()

    def moved(self) -> None:
        """The server went to other blocks: passes that began at the old ones end."""
        for job in list(self._jobs.values()):
            if job.moved():
                self._server.queue.remove(self._client, job)

    def done(self, call: int, result: bytes | PassGradients) -> None:
        """A pass went through: answer."""
        rows, tensors = (result, b"") if isinstance(result, bytes) else (
            result.rows, result.tensors
        )  # fmt: skip
        self._jobs.pop(call, None)
        self._post(Done(call, len(rows), len(tensors)), memoryview(rows), memoryview(tensors))

    def failed(self, call: int, error: ShoalError) -> None:
        """It did not."""
        logger.info("training refused client=%s reason=%s", short(self._client), error)
        self._jobs.pop(call, None)
        self._post(error_message(error, call))

    def _post(self, message: Message, *values: memoryview) -> None:
        if not self._is_closed:
            self._answers.put_nowait((message, values))

    async def _write(self) -> None:
        while True:
            await self._send(*await self._answers.get())

    async def _send(self, message: Message, values: tuple[memoryview, ...]) -> None:
        """Send an answer and its bytes.

        Raises:
            PeerTimeout: the client takes them too slowly.
        """
        num_bytes = sum(len(value) for value in values)
        patience_s = SEND_TIMEOUT_S + min(ANSWER_S_MAX, num_bytes / ANSWER_BYTES_PER_S)
        try:
            async with asyncio.timeout(patience_s):
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._channel.send(message)
                call, offset = getattr(message, "call", 0), 0
                for value in values:
                    for at in range(0, len(value), CHUNK_BYTES_MAX):
                        piece = value[at : at + CHUNK_BYTES_MAX]
                        async with asyncio.timeout(SEND_TIMEOUT_S):
                            await self._channel.send(Chunk(call, offset), piece)
                        offset += len(piece)
        except TimeoutError as error:
            raise PeerTimeout(f"{short(self._client)} takes no answers") from error
        self._closed(call)

    def _closed(self, call: int) -> None:
        """Nothing of a call is in memory any more."""
        if self._sizes.pop(call, None) is not None:
            self._used_s = asyncio.get_running_loop().time()
        self._answer_sizes.pop(call, None)

    async def _say_alive(self) -> None:
        while True:
            await asyncio.sleep(ALIVE_PERIOD_S)
            self._server.kept.expire(asyncio.get_running_loop().time())
            if (self._jobs or self._uploads) and self._answers.empty():
                self._post(Training(self._server.steps))

    async def _read(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    message, payload = await self._channel.receive()
            except TimeoutError as error:
                raise PeerTimeout(f"{short(self._client)} trains no more") from error
            match message:
                case PutTensors() | Forward() | Backward():
                    self._announce(message)
                case Chunk():
                    self._take(message, payload)
                case Forget():
                    self._forget(message.numbers)
                case _:
                    raise ProtocolError(f"{type(message).__name__} on a training stream")

    def _announce(self, message: PutTensors | Forward | Backward) -> None:
        """Take a call if it can be; its bytes follow in any case."""
        call = message.call
        if call <= self._last_call:
            return  # it came before: calls rise
        self._last_call = call
        if self._answers.qsize() > ANSWERS_MAX:
            raise ProtocolError("calls come and answers are not taken")
        try:
            self._check(message)
        except ShoalError as error:
            self.failed(call, error)
            return
        self._sizes[call] = message.num_bytes
        self._answer_sizes[call] = self._answer_size(message)
        self._uploads[call] = Upload(message=message, data=bytearray())
        if not message.num_bytes:
            self._complete(self._uploads.pop(call))

    def _take(self, chunk: Chunk, payload: memoryview) -> None:
        """Bytes of a call; those of a refused one, and those that came before, are dropped."""
        if payload.nbytes > CHUNK_BYTES_MAX:
            raise MessageTooLarge(f"a chunk of {payload.nbytes} bytes (limit {CHUNK_BYTES_MAX})")
        upload = self._uploads.get(chunk.call)
        if upload is None or chunk.offset < len(upload.data):
            return
        end, announced = chunk.offset + payload.nbytes, upload.message.num_bytes
        if chunk.offset > len(upload.data) or end > announced:
            raise ProtocolError(f"bytes {chunk.offset} to {end} of call {chunk.call} with "
                                f"{announced}, {len(upload.data)} are here")  # fmt: skip
        upload.data += payload
        if end == announced:
            self._complete(self._uploads.pop(chunk.call))

    def _complete(self, upload: Upload) -> None:
        message, data = upload.message, memoryview(upload.data)
        try:
            if isinstance(message, PutTensors):
                self._put(message, upload.data)
                self._post(Done(message.call))
            else:
                job = self._job(message, data)
                self._jobs[message.call] = job
                self._server.add(self._client, job)
        except ShoalError as error:
            self.failed(message.call, error)

    def _check(self, message: PutTensors | Forward | Backward) -> None:
        """Refuse what can't be, before memory is taken.

        Raises:
            ShoalError: why.
        """
        self._server.check_taking()
        limits, facts = self._server.limits, self._server.facts
        if len(self._sizes) >= limits.passes_per_client:
            wait_s = BUSY_RETRY_S
            raise PeerBusy(f"{len(self._sizes)} calls of yours are open here", retry_after_s=wait_s)
        if isinstance(message, PutTensors):
            check_tensors(message, facts, limits)
        else:
            check_pass(message, facts, limits)
        limit = limits.open_bytes_per_client
        if self.open_bytes + message.num_bytes > limit:
            raise PeerBusy(f"your calls hold {limit} bytes here", retry_after_s=BUSY_RETRY_S)
        share, visitors = limits.address_share, self._server.visitors
        calls = Pot[Visitor]("calls", limit, limits.open_bytes_max, lambda one: one.open_bytes)
        calls.check(message.num_bytes, self, visitors, share)
        if isinstance(message, PutTensors) and message.name not in self._tensors:
            self._check_tensors(message.num_bytes)
        self._check_answer(self._answer_size(message), self.answer_bytes)

    def _answer_size(self, message: PutTensors | Forward | Backward) -> int:
        """Bytes of the answer, as far as it is known now."""
        if isinstance(message, PutTensors):
            return 0
        micro, size = message.micro, self._server.facts.hidden_size
        num_bytes = sum(micro.lengths) * row_bytes(micro.encoding, size)
        tensors = self._tensors.get(micro.tensors)
        if tensors is not None and isinstance(message, Backward):
            spec = tensors.spec
            values = sum(block.num_values(size, spec.rank) for block in spec.blocks)
            num_bytes += GRADIENT_BYTES * values
        return num_bytes

    def _check_answer(self, num_bytes: int, mine: int) -> None:
        """Refuse an answer that finds no room beside others; one alone always does.

        Raises:
            PeerBusy: there are others.
        """
        limits = self._server.limits
        if mine and mine + num_bytes > limits.answer_bytes_per_client:
            raise PeerBusy(f"answers of {mine} bytes wait for you", retry_after_s=BUSY_RETRY_S)
        pot = Pot[Visitor](
            "answers", limits.answer_bytes_per_client, limits.answer_bytes_max,
            lambda one: mine if one is self else one.answer_bytes,
        )  # fmt: skip
        pot.check(num_bytes, self, self._server.visitors, limits.address_share)

    def _used_tensors(self) -> list[TrainedTensors]:
        """Those of open calls, though they may have been replaced."""
        found = (job.tensors for job in self._jobs.values())
        return unique(one for one in found if one is not None)

    def _check_tensors(self, num_bytes: int) -> None:
        """Refuse tensors that find no room beside what open calls use, or what others have.

        Raises:
            PeerBusy: they must end first.
        """
        limits = self._server.limits
        limit, used_bytes = limits.tensor_bytes_per_client, sum(map(_size, self._used_tensors()))
        if used_bytes + num_bytes > limit:
            raise PeerBusy(
                f"your open calls use tensors of {used_bytes} bytes, and {limit} may be here",
                retry_after_s=BUSY_RETRY_S,
            )
        mine = self.tensor_bytes  # the oldest go
        more_bytes = min(limit, mine + num_bytes) - mine
        pot = Pot[Visitor]("tensors", limit, limits.tensor_bytes_max, lambda one: one.tensor_bytes)
        pot.check(max(0, more_bytes), self, self._server.visitors, limits.address_share)

    def _put(self, message: PutTensors, data: bytearray) -> None:
        """Hold tensors; the oldest that no open call uses make room."""
        spec, before = spec_of(message), self._tensors.pop(message.name, None)
        if before is not None:
            if before.spec == spec and before.values == data:  # kept passes have them
                self._tensors[message.name] = before
                return
            self._server.kept.drop_with(self._client, before)
        self._check_tensors(len(data))
        limit, used = self._server.limits.tensor_bytes_per_client, self._used_tensors()
        unused = deque(
            name for name, one in self._tensors.items() if not any(one is two for two in used)
        )
        while unused and (
            self.tensor_bytes + len(data) > limit or len(self._tensors) >= TENSOR_SETS_MAX
        ):
            self._server.kept.drop_with(self._client, self._tensors.pop(unused.popleft()))
        self._tensors[message.name] = TrainedTensors(spec=spec, values=data)

    def _has_tensors(self, tensors: TrainedTensors) -> bool:
        return any(one is tensors for one in self._tensors.values())

    def _job(self, message: Forward | Backward, data: memoryview) -> PassJob:
        micro = message.micro
        num_bytes = sum(micro.lengths) * row_bytes(micro.encoding, self._server.facts.hidden_size)
        gradients, rows = None, data
        if isinstance(message, Backward):
            gradients, rows = data[:num_bytes], data[num_bytes:]
        size = self._answer_size(message)
        if size > self._answer_sizes[message.call]:  # other tensors came meanwhile
            mine = self.answer_bytes - self._answer_sizes[message.call]
            self._check_answer(size, mine)
            self._answer_sizes[message.call] = size
        work = None
        if len(rows):
            work = self._work(micro, rows)
            self._server.kept.drop(self._client, message.number)
        elif not self._server.kept.has(self._client, message.number):
            raise SessionLost("the pass is not kept any more: send its rows again")
        return PassJob(
            self._client,
            message.call,
            message.number,
            work,
            gradients=gradients,
            is_kept=isinstance(message, Forward) and message.is_kept,
            kept=self._server.kept,
            answers=self,
            trainer=self._server.trainer,
            facts=lambda: self._server.facts,
            held_bytes_max=self._server.limits.pass_bytes_max,
            clock=asyncio.get_running_loop().time,
            has_tensors=self._has_tensors,
        )

    def _work(self, micro: Micro, rows: memoryview) -> PassWork:
        trained = None
        if micro.tensors:
            trained = self._tensors.get(micro.tensors)
            if trained is None:
                raise AdapterMissing(f"no tensors {micro.tensors.hex()} here: put them first")
            self._tensors.move_to_end(micro.tensors)
        span, drawn = Span(micro.start, micro.end), micro.drawn
        if trained is not None and any(one.index not in span for one in trained.spec.blocks):
            raise BadInput(f"trained tensors of other blocks than {span}")
        draw = None
        if drawn is not None:
            key = DropoutKey(seed=drawn.seed, step=drawn.step)
            draw = Draw(key=key, first_sequence=drawn.first_sequence)
        return PassWork(
            span=span,
            lengths=tuple(micro.lengths),
            rows=rows,
            encoding=micro.encoding,
            trained=trained,
            draw=draw,
        )

    def _forget(self, numbers: list[int]) -> None:
        for number in numbers:
            self._server.kept.drop(self._client, number)
        gone = set(numbers)
        for call, upload in list(self._uploads.items()):
            if not isinstance(upload.message, PutTensors) and upload.message.number in gone:
                del self._uploads[call]
                self._closed(call)
        for call, job in list(self._jobs.items()):
            if job.number in gone:
                job.give_up()
                self._server.queue.remove(self._client, job)
                del self._jobs[call]
                self._closed(call)


def _size(tensors: TrainedTensors) -> int:
    return memoryview(tensors.values).nbytes
