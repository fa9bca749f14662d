"""Jobs of training: what they hold, what they may hold, and when they end."""

from __future__ import annotations

import asyncio
import gc
import weakref

from shoal.base.errors import MessageTooLarge, PeerBusy, SessionLost, ShoalError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.base.training import (
    BlockTrainer,
    PassGradients,
    PassWork,
    TrainedSpec,
    TrainedTensors,
)
from shoal.lab.clock import run_virtual
from shoal.lab.toy_backend import ToyBackend, ToyConfig
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.server.training_jobs import PassJob
from shoal.server.training_kept import KEPT_PER_CLIENT_MAX, KeptPasses
from shoal.server.training_queue import TrainingQueue

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)
ROW = 4 * HIDDEN_SIZE
SPAN = Span(0, 4)
PASS_BYTES = 64 * 2 * 4
"""What a toy pass of two rows holds."""


class Bytes(bytearray):
    """Of a message; whether they are still held can be seen."""


class Place:
    """What jobs need of a server."""

    def __init__(self, client_bytes_max: int = 1 << 20, total_bytes_max: int = 1 << 20) -> None:
        self.backend = ToyBackend(ToyConfig(span=SPAN, num_blocks=4))
        self.kept = KeptPasses(client_bytes_max, total_bytes_max)
        self.results: dict[int, bytes | PassGradients] = {}
        self.errors: dict[int, ShoalError] = {}
        self._calls = 0

    def trainer(self) -> BlockTrainer:
        trainer = self.backend.trainer()
        assert trainer is not None
        return trainer

    def move(self, span: Span) -> None:
        self.backend = ToyBackend(ToyConfig(span=span, num_blocks=4))

    def done(self, call: int, result: bytes | PassGradients) -> None:
        self.results[call] = result

    def failed(self, call: int, error: ShoalError) -> None:
        self.errors[call] = error

    def job(
        self,
        client: PeerId,
        rows: int | Bytes | None = 2,
        number: int = 1,
        *,
        back: bool = False,
        trained: TrainedTensors | None = None,
        has_tensors: bool = True,
    ) -> PassJob:
        """`rows` None: those of a kept pass; `back`: the way back, else a pass to be kept."""
        self._calls += 1
        work = None
        if rows is not None:
            work = _work(rows, trained)
        return PassJob(
            client, self._calls, number, work,
            gradients=bytes((2 if work is None else work.num_rows) * ROW) if back else None,
            is_kept=not back, kept=self.kept, answers=self, trainer=self.trainer,
            facts=lambda: self.backend.facts,
            held_bytes_max=1 << 20, clock=asyncio.get_running_loop().time,
            has_tensors=lambda tensors: has_tensors,
        )  # fmt: skip


def _work(rows: int | Bytes, trained: TrainedTensors | None = None) -> PassWork:
    values = rows if isinstance(rows, Bytes) else bytes(rows * ROW)
    lengths = (len(values) // ROW,)
    return PassWork(span=SPAN, lengths=lengths, rows=values, encoding="float32", trained=trained)


async def finish(job: PassJob) -> None:
    while not job.is_over:
        await job.step()


def test_a_job_that_is_given_up_lets_its_rows_go_and_leaves_the_queue() -> None:
    async def story() -> None:
        place, queue = Place(), TrainingQueue()
        rows = Bytes(8 * ROW)
        seen = weakref.ref(rows)
        first, second = place.job(A), place.job(A, rows, 2)
        queue.add(A, first)
        queue.add(A, second)
        del rows
        second.give_up()
        gc.collect()
        assert seen() is None
        queue.remove(A, second)
        queue.remove(A, second)
        queue.remove(A, first)
        assert not queue.is_waiting

    run_virtual(story)


def test_calls_that_wait_or_run_when_the_server_moves_are_lost_not_bad() -> None:
    async def story() -> None:
        place = Place()
        old = place.backend.training
        begun, waiting, kept = place.job(A), place.job(A, number=2), place.job(B)
        await finish(kept)
        await begun.step()
        place.move(Span(1, 3))
        assert begun.moved()
        assert not waiting.moved()
        assert not kept.moved()
        place.kept.forget()
        assert begun.is_over
        assert not old.num_open  # the old blocks may go
        await finish(waiting)
        assert {call: type(error) for call, error in place.errors.items()} == {
            1: SessionLost,
            2: SessionLost,
        }

    run_virtual(story)


def test_passes_that_run_at_once_share_the_memory() -> None:
    async def story() -> None:
        place = Place(total_bytes_max=4 * PASS_BYTES)
        kept = place.job(B)
        await finish(kept)
        jobs = [place.job(PeerId(bytes([n]) * 32), back=True) for n in range(8)]
        for job in jobs:
            await job.step()  # all begin before any is through
        refused = [job for job in jobs if job.is_over]
        assert len(refused) == 4
        assert all(isinstance(error, PeerBusy) for error in place.errors.values())
        assert not len(place.kept)  # it made room, and so did passes that might have held more
        place.errors.clear()
        await asyncio.gather(*(finish(job) for job in jobs))
        await finish(place.job(A, back=True))
        assert not place.errors
        large = place.job(A, 9, back=True)
        await finish(large)
        assert [type(error) for error in place.errors.values()] == [MessageTooLarge]
        assert place.backend.training.num_open == 0

    run_virtual(story)


def test_what_is_kept_of_a_client_is_bounded_and_nothing_depends_on_it() -> None:
    async def story() -> None:
        place = Place()
        for number in range(KEPT_PER_CLIENT_MAX + 1):
            await finish(place.job(A, number=number))
        assert len(place.kept) == KEPT_PER_CLIENT_MAX == len(place.results) - 1
        tensors = TrainedTensors(
            spec=TrainedSpec(config=None, encoding="float32", blocks=()), values=b""
        )
        one = place.trainer().begin(_work(2), is_for_backward=True, held_bytes_max=0)
        place.kept.forget()
        place.kept.keep(A, 1, one, tensors, 0.0)
        place.kept.drop_with(B, tensors)
        assert place.kept.has(A, 1)
        place.kept.drop_with(A, tensors)  # whose memory is the client's no more
        assert not place.backend.training.num_open
        small = Place(client_bytes_max=2 * PASS_BYTES - 1)
        await finish(small.job(A))
        await finish(small.job(A, number=2))
        assert len(small.kept) == 1
        await finish(small.job(A, None, back=True))
        await finish(small.job(A, None, number=2, back=True))
        assert {call: type(error) for call, error in small.errors.items()} == {4: SessionLost}

    run_virtual(story)


def test_a_pass_whose_tensors_were_replaced_meanwhile_is_not_kept() -> None:
    async def story() -> None:
        place = Place()
        spec = TrainedSpec(config=None, encoding="float32", blocks=())
        tensors = TrainedTensors(spec=spec, values=b"")
        for has_tensors in (True, False):
            await finish(place.job(A, trained=tensors, has_tensors=has_tensors))
            assert place.kept.has(A, 1) == has_tensors
            place.kept.forget()
        assert place.kept.held_bytes() == 0

    run_virtual(story)
