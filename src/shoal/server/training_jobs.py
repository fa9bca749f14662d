"""Jobs of training: a pass in one direction, step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from shoal.base.backend import BackendFacts
from shoal.base.errors import InternalError, SessionLost, ShoalError
from shoal.base.ids import PeerId, short
from shoal.base.training import (
    BlockTrainer,
    PassGradients,
    PassWork,
    TrainedTensors,
    TrainingPass,
    Values,
)
from shoal.server.training_kept import KeptPasses

logger = logging.getLogger(__name__)


class Answers(Protocol):
    """Where jobs say what came of them. None of it waits."""

    def done(self, call: int, result: bytes | PassGradients) -> None:
        """A pass went through."""

    def failed(self, call: int, error: ShoalError) -> None:
        """It did not."""


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
        has_tensors: Callable[[TrainedTensors], bool] = lambda tensors: True,
    ) -> None:
        """`work` None: the way back of a kept pass.

        `has_tensors`: whether the client still has these here. A pass with others is not kept,
        or it would hold what the client has replaced.
        """
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
        self._has_tensors = has_tensors
        self._pass: TrainingPass | None = None
        self._is_back = False
        self._is_stepping = False

    @property
    def tensors(self) -> TrainedTensors | None:
        """The trained tensors that it holds."""
        return None if self._work is None else self._work.trained

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
            tensors = self.tensors
            is_current = tensors is None or self._has_tensors(tensors)
            if self._is_kept and one.held_bytes and is_current:
                self._kept.release(one)
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
            room = self._kept.room_to_run(self._client, self._held_bytes_max, least_bytes, now_s)
        elif self._is_kept:
            room = self._kept.room_to_keep(self._client, self._held_bytes_max, now_s)
            is_for_backward = self._is_kept = room >= max(1, least_bytes)
        self._pass = trainer.begin(self._work, is_for_backward=is_for_backward, held_bytes_max=room)
        self._kept.reserve(self._client, self._pass, room if is_for_backward else 0)
        return self._pass

    def _turn(self, one: TrainingPass) -> None:
        if self._gradients is None:
            raise InternalError("a way back without gradients")
        one.turn(self._gradients)
        self._kept.reserve(self._client, one, one.held_bytes)  # it holds no more from now on
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
