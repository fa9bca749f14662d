"""How to train: numbers a person chooses, checked once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from shoal.base.errors import ConfigError

Schedule = Literal["constant", "linear", "cosine"]
"""What the learning rate does after its warm-up: stay, or fall to 0 by the last step."""

BETAS: Final = (0.9, 0.999)
EPSILON: Final = 1e-8
"""AdamW's, as everywhere."""

SEED_MAX: Final = 2**53
"""Servers are told the seed of dropout; messages hold no larger numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """A run of optimiser steps.

    Raises:
        ConfigError: a value that cannot be, and which.
    """

    num_steps: int
    batch_size: int = 4
    """Examples of one pass."""
    accumulate: int = 1
    """Passes of one step: their gradients add up before the optimiser moves."""
    learning_rate: float = 1e-3
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Longer gradients are cut to this length; 0: never."""
    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    save_every: int = 20
    """Steps between checkpoints; the last step always has one."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_option(name)} {getattr(self, name)}: at least 1")
        for name in ("warmup_steps", "eval_every", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{_option(name)} {getattr(self, name)}: at least 0")
        if self.seed > SEED_MAX:
            raise ConfigError(f"--seed {self.seed}: at most {SEED_MAX}")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{_option(name)} {value}: a number of at least 0")
        if not self.learning_rate:
            raise ConfigError("--learning-rate 0: nothing would be learned")
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"--schedule {self.schedule}: one of {', '.join(get_args(Schedule))}")
        if self.warmup_steps >= self.num_steps and self.warmup_steps:
            raise ConfigError(
                f"--warmup-steps {self.warmup_steps}: less than the {self.num_steps} steps"
            )

    @property
    def per_step(self) -> int:
        """Examples of one optimiser step."""
        return self.batch_size * self.accumulate

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        if self.schedule == "linear":
            return self.learning_rate * (1.0 - done)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))


def steps_of(num_examples: int, epochs: float, per_step: int) -> int:
    """Steps that so many epochs take, at least one.

    Raises:
        ConfigError: no epochs.
    """
    if not math.isfinite(epochs) or epochs <= 0:
        raise ConfigError(f"--epochs {epochs:g}: more than 0")
    return max(1, math.ceil(num_examples * epochs / per_step))


def _option(name: str) -> str:
    option = {"num_steps": "steps", "clip_norm": "clip"}.get(name, name)
    return "--" + option.replace("_", "-")
