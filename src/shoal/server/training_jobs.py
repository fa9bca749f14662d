"""Jobs of training: a pass in one direction, step by step, and what is kept of it.

A kept pass saves its way back from running the blocks forward again. It is a favour: it is
bounded, dropped at will, and whoever comes back for one that is gone sends the rows again.
What passes under way may hold is set aside when they begin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from shoal.base.backend import BackendFacts
from shoal.base.errors import (
    InternalError,
    MessageTooLarge,
    PeerBusy,
    SessionLost,
    ShoalError,
)
from shoal.base.ids import PeerId, short
from shoal.base.training import (
    BlockTrainer,
    PassGradients,
    PassWork,
    TrainedTensors,
    TrainingPass,
    Values,
)
from shoal.server.training_limits import BUSY_RETRY_S

logger = logging.getLogger(__name__)

KEPT_S: Final = 120.0
"""A pass that nobody came back for is dropped after this: steps of optimisers are shorter."""

KEPT_PER_CLIENT_MAX: Final = 256
"""Kept passes of one client, however small: a step has some dozens of micro-batches."""


class Answers(Protocol):
    """Where jobs say what came of them. None of it waits."""

    def done(self, call: int, result: bytes | PassGradients) -> None:
        """A pass went through."""

    def failed(self, call: int, error: ShoalError) -> None:
        """It did not."""


@dataclass(slots=True, kw_only=True)
class _Kept:
    """A pass that went forward, or is on its way."""

    training_pass: TrainingPass
    since_s: float
    held_bytes: int
    tensors: TrainedTensors | None
    """Their values are not counted: the client may have no more of them than its quota."""


class KeptPasses:
    """What is kept of one server's forward passes, within a budget per client and in all."""

    def __init__(self, client_bytes_max: int, total_bytes_max: int) -> None:
        self._client_bytes_max = client_bytes_max
        self._total_bytes_max = total_bytes_max
        self._kept: dict[tuple[PeerId, int], _Kept] = {}
        self._reserved: dict[int, tuple[TrainingPass, int]] = {}
        """Passes under way, and how many bytes each may hold."""

    def __len__(self) -> int:
        return len(self._kept)

    def held_bytes(self, client: PeerId | None = None) -> int:
        """Memory that is kept for a client, or for all."""
        return sum(
            kept.held_bytes for (one, _), kept in self._kept.items() if client in (None, one)
        )

    def reserve(self, one: TrainingPass, num_bytes: int) -> None:
        """A pass is on its way and may hold so much; it counts until `release`."""
        self._reserved[id(one)] = one, num_bytes

    def release(self, one: TrainingPass) -> None:
        """A pass is kept now, or over."""
        self._reserved.pop(id(one), None)

    def room_to_run(self, pass_bytes_max: int, least_bytes: int, now_s: float) -> int:
        """What a way back that begins anew may hold; others make room for the least.

        Raises:
            MessageTooLarge: `least_bytes` are more than all may hold.
            PeerBusy: others hold too much now.
        """
        self.expire(now_s)
        if least_bytes > self._total_bytes_max:
            raise MessageTooLarge(
                f"the rows that enter these blocks are {least_bytes} bytes, and this server holds "
                f"{self._total_bytes_max}: send fewer rows at once"
            )
        if self._free_bytes < least_bytes:
            for one, _ in list(self._reserved.values()):
                self.reserve(one, one.narrow())
        while self._kept and self._free_bytes < least_bytes:
            self.drop(*next(iter(self._kept)))
        if self._free_bytes < least_bytes:
            raise PeerBusy("the memory for training is taken", retry_after_s=BUSY_RETRY_S)
        return max(least_bytes, self._share(pass_bytes_max))

    def room_to_keep(self, client: PeerId, pass_bytes_max: int, now_s: float) -> int:
        """What one more pass of a client may hold; 0: nothing more is kept of it."""
        self.expire(now_s)
        if sum(one == client for one, _ in self._kept) >= KEPT_PER_CLIENT_MAX:
            return 0
        mine = self._client_bytes_max - self.held_bytes(client)
        return max(0, min(mine, self._share(pass_bytes_max)))

    @property
    def _free_bytes(self) -> int:
        reserved = sum(num_bytes for _, num_bytes in self._reserved.values())
        return self._total_bytes_max - self.held_bytes() - reserved

    def _share(self, pass_bytes_max: int) -> int:
        """A pass gets half of what is free at most: others come before it is through."""
        return max(0, min(pass_bytes_max, self._free_bytes // 2))

    def keep(
        self,
        client: PeerId,
        number: int,
        one: TrainingPass,
        tensors: TrainedTensors | None,
        now_s: float,
    ) -> None:
        """Keep a pass that went through, in place of one of that number."""
        self.drop(client, number)
        self._kept[(client, number)] = _Kept(
            training_pass=one, since_s=now_s, held_bytes=one.held_bytes, tensors=tensors
        )

    def drop_with(self, client: PeerId, tensors: TrainedTensors) -> None:
        """Free the passes of a client that have these tensors: it gave them up."""
        for (one, number), kept in list(self._kept.items()):
            if one == client and kept.tensors is tensors:
                self.drop(one, number)

    def has(self, client: PeerId, number: int) -> bool:
        """Whether the pass is kept."""
        return (client, number) in self._kept

    def take(self, client: PeerId, number: int) -> TrainingPass | None:
        """The pass, which is not kept any more; None: it is gone."""
        kept = self._kept.pop((client, number), None)
        return None if kept is None else kept.training_pass

    def drop(self, client: PeerId, number: int) -> None:
        """Free a pass; one that isn't kept is ignored."""
        kept = self.take(client, number)
        if kept is not None:
            kept.close()

    def forget(self, client: PeerId | None = None) -> None:
        """Free all passes of a client, or of all."""
        for one, number in list(self._kept):
            if client in (None, one):
                self.drop(one, number)

    def expire(self, now_s: float) -> None:
        """Free passes that nobody came back for."""
        for (client, number), kept in list(self._kept.items()):
            if kept.since_s + KEPT_S < now_s:
                logger.info("kept pass expired client=%s", short(client))
                self.drop(client, number)


class PassJob:
    """One call of a client: a pass forward, or a way back. `shoal.server.training_queue.Job`."""

    def __init__(
        self,
        client: PeerId,
        call: int,
        number: int,
        work: PassWork | None,
        *,
        gradients: Values | None,
        is_kept: bool,
        kept: KeptPasses,
        answers: Answers,
        trainer: Callable[[], BlockTrainer],
        facts: Callable[[], BackendFacts],
        held_bytes_max: int,
        clock: Callable[[], float],
    ) -> None:
        """`work` None: the way back of a kept pass."""
        self.number = number
        self.is_over = False
        self._client = client
        self._call = call
        self._work = work
        self._gradients = gradients
        self._is_backward = gradients is not None
        self._is_kept = is_kept
        self._kept = kept
        self._answers = answers
        self._trainer = trainer
        self._facts = facts
        self._held_bytes_max = held_bytes_max
        self._clock = clock
        self._pass: TrainingPass | None = None
        self._is_back = False
        self._is_stepping = False

    async def step(self) -> None:
        """Run one block; what fails is answered."""
        self._is_stepping = True
        try:
            await self._step()
        except ShoalError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("training pass broke client=%s", short(self._client))
            self._fail(InternalError(f"a training pass broke: {type(error).__name__}: {error}"))
        finally:
            self._is_stepping = False
            if self.is_over:
                self._close()

    def give_up(self) -> None:
        """Nobody waits for it any more; a step under way ends first."""
        self.is_over = True
        if not self._is_stepping:
            self._close()

    def moved(self) -> bool:
        """The server went to other blocks; what began at the old ones ends. No step is under way.

        Returns whether it ended.
        """
        if self._pass is None or self.is_over:
            return False
        self._fail(SessionLost("the server went to other blocks amid this pass: send it again"))
        self._close()
        return True

    async def _step(self) -> None:
        one = self._pass or self._begun()
        if one.steps_left:
            await one.step()
        if one.steps_left or self.is_over:
            return
        if not self._is_backward:
            self._answers.done(self._call, one.output())
            if self._is_kept and one.held_bytes:
                self._kept.release(one)
                tensors = None if self._work is None else self._work.trained
                self._kept.keep(self._client, self.number, one, tensors, self._clock())
                self._pass = None
        elif self._is_back:
            self._answers.done(self._call, one.gradients())
        else:
            self._turn(one)
            return
        self.is_over = True

    def _begun(self) -> TrainingPass:
        if self._work is None:
            kept = self._kept.take(self._client, self.number)
            if kept is None:
                raise SessionLost("the pass is not kept any more: send its rows again")
            self._pass = kept
            self._turn(kept)
            return kept
        span, mine = self._work.span, self._facts().span
        if not mine.covers(span):  # they were when the call came
            raise SessionLost(f"blocks {span} are not served here any more (we have {mine})")
        trainer, now_s = self._trainer(), self._clock()
        least_bytes, room, is_for_backward = trainer.least_bytes(self._work), 0, self._is_backward
        if is_for_backward:
            room = self._kept.room_to_run(self._held_bytes_max, least_bytes, now_s)
        elif self._is_kept:
            room = self._kept.room_to_keep(self._client, self._held_bytes_max, now_s)
            is_for_backward = self._is_kept = room >= max(1, least_bytes)
        self._pass = trainer.begin(self._work, is_for_backward=is_for_backward, held_bytes_max=room)
        self._kept.reserve(self._pass, room if is_for_backward else 0)
        return self._pass

    def _turn(self, one: TrainingPass) -> None:
        if self._gradients is None:
            raise InternalError("a way back without gradients")
        one.turn(self._gradients)
        self._kept.reserve(one, one.held_bytes)  # it holds no more from now on
        self._gradients, self._is_back = None, True

    def _fail(self, error: ShoalError) -> None:
        if not self.is_over:
            self._answers.failed(self._call, error)
        self.is_over = True

    def _close(self) -> None:
        self._work = self._gradients = None  # whoever still holds the job holds no rows
        if self._pass is not None:
            self._kept.release(self._pass)
            self._pass.close()
            self._pass = None
