"""The loop of training: batches, gradients, optimiser steps, evaluation.

`TuningRun.advance` gives what happened step by step; between two of them the run is whole and
may be saved. A step depends on the settings and its number alone, so that a run that goes on
computes what it would have computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shoal.base.adapters import DropoutKey
from shoal.base.errors import BadOutput, ConfigError
from shoal.hf.tuning_checkpoint import (
    Checkpoint,
    Evaluated,
    History,
    StepDone,
    restore,
    write_checkpoint,
)
from shoal.hf.tuning_examples import Prepared, batches, step_examples
from shoal.hf.tuning_model import TunedModel
from shoal.hf.tuning_settings import BETAS, EPSILON, TuningSettings


class TuningRun:
    """One run, from its first step to its last."""

    def __init__(
        self,
        model: TunedModel,
        settings: TuningSettings,
        learned: Prepared,
        kept_back: Prepared | None,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives seconds; only durations depend on it."""
        self.model = model
        self.settings = settings
        self.history = History(steps=[], evaluations=[])
        self._learned = learned.examples
        self._kept_back = () if kept_back is None else kept_back.examples
        self._clock = clock
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=settings.weight_decay,
        )

    @property
    def steps_left(self) -> int:
        """Steps still to do."""
        return self.settings.num_steps - len(self.history.steps)

    @property
    def num_parameters(self) -> int:
        """Values that are learned."""
        return sum(one.numel() for one in self._parameters)

    def advance(self) -> Iterator[StepDone | Evaluated]:
        """Do the steps that are left, and the evaluations between them.

        Raises:
            BadOutput: the loss is not a number any more.
            BadInput, NoRouteError, PeerError: a pass could not be done; nothing of the
                step that it belonged to has happened.
        """
        self._optimizer.zero_grad()
        while True:
            if self._is_evaluation_due():
                evaluated = self.evaluate()
                self.history.evaluations.append(evaluated)
                yield evaluated
            if not self.steps_left:
                return
            done = self._step(len(self.history.steps))
            self.history.steps.append(done)
            yield done

    def save(self, path: Path, run: Mapping[str, Any]) -> None:
        """Write a checkpoint; `run` says what this run is.

        Raises:
            ConfigError: it can't be written.
        """
        write_checkpoint(path, run, self.history, self.model, self._optimizer)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's state.

        Raises:
            ConfigError: it is of something else.
        """
        if checkpoint.num_steps > self.settings.num_steps:
            raise ConfigError(
                f"the checkpoint has {checkpoint.num_steps} of {self.settings.num_steps} steps"
            )
        restore(checkpoint, self.model, self._optimizer)
        self.history = checkpoint.history

    @torch.no_grad()
    def evaluate(self) -> Evaluated:
        """Loss, and for classes accuracy, of the examples that were kept back.

        Raises:
            ConfigError: none were.
        """
        if not self._kept_back:
            raise ConfigError("no examples were kept back for evaluation")
        self.model.eval()
        total, counted, right = 0.0, 0, 0
        for batch in batches(
            self._kept_back,
            range(len(self._kept_back)),
            batch_size=self.settings.batch_size,
            is_classes=self.model.classes is not None,
        ):
            loss = self.model(batch)
            total += float(loss.total)
            counted += loss.num_counted
            right += loss.num_right
        is_classes = self.model.classes is not None
        return Evaluated(
            step=len(self.history.steps),
            loss=total / counted,
            accuracy=right / counted if is_classes else None,
        )

    def _is_evaluation_due(self) -> bool:
        done, every = len(self.history.steps), self.settings.eval_every
        if not self._kept_back or any(one.step == done for one in self.history.evaluations):
            return False
        return done == self.settings.num_steps or (every > 0 and done % every == 0)

    def _step(self, index: int) -> StepDone:
        """One optimiser step; parameters and state change at its end only."""
        settings, started_s = self.settings, self._clock()
        self.model.train()
        chosen = step_examples(
            len(self._learned), index, per_step=settings.per_step, seed=settings.seed
        )
        parts = list(
            batches(
                self._learned, chosen, batch_size=settings.batch_size,
                is_classes=self.model.classes is not None,
            )
        )  # fmt: skip
        total, counted, num_tokens = 0.0, 0, 0
        for number, batch in enumerate(parts):
            key = DropoutKey(seed=settings.seed, step=index * settings.accumulate + number)
            loss = self.model(batch, key)
            loss.total.backward()
            total += float(loss.total.detach())
            counted += loss.num_counted
            num_tokens += batch.num_tokens + self.model.num_prompt_tokens * len(batch.lengths)
        gradient = self._scaled_gradient(counted)
        if not math.isfinite(total) or not math.isfinite(gradient):
            raise BadOutput(
                f"the loss or its gradient is not a number at step {index + 1}: lower "
                "--learning-rate, or look for broken examples"
            )
        rate = settings.rate(index)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return StepDone(
            step=index + 1,
            loss=total / counted,
            rate=rate,
            gradient=gradient,
            num_tokens=num_tokens,
            duration_s=self._clock() - started_s,
        )

    def _scaled_gradient(self, counted: int) -> float:
        """Turn the gradient of the sum into that of the mean, and cut it; its length before."""
        grads = [one.grad for one in self._parameters if one.grad is not None]
        for grad in grads:
            grad.div_(counted)
        limit = self.settings.clip_norm or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))
