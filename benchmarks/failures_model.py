"""From measured parts to steps/s: the same seeded failures for every method.

A part is the time of each step without a failure, and what a failure costs on top: a
straight line over the position, fitted to the losses of a real run.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, mean, median
from typing import Final

RUNS: Final = 60
"""Seeded runs per figure."""

HOUR_S: Final = 3600.0
"""Who has not finished by then is given up, as in the paper."""

NEIGHBOURS: Final = 12
"""Steps on either side whose median is what a step without a failure takes there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What one method costs."""

    step_s: tuple[float, ...]
    """Of each step in turn, without a failure."""
    loss_line: tuple[float, float]
    """(seconds, seconds per step done before): what a failure adds."""
    repeats_step: bool = False
    """Whether a failure only means that the step is done again."""

    def loss_s(self, index: int) -> float:
        """What a failure before this step adds."""
        return self.step_s[index] if self.repeats_step else self._line_s(index)

    def _line_s(self, index: int) -> float:
        return max(0.0, self.loss_line[0] + self.loss_line[1] * index)

    @classmethod
    def of(cls, step_s: Sequence[float]) -> Parts:
        """Of a run without failures."""
        return cls(step_s=tuple(step_s), loss_line=(0.0, 0.0))

    @classmethod
    def of_whole(cls, found: Sequence[tuple[int, float]], prompt: int, steps: int) -> Parts:
        """Of a method that computes everything anew in every step; measured at some lengths."""
        step_s = tuple(_between(found, prompt + index) for index in range(1, steps + 1))
        return cls(step_s=step_s, loss_line=(0.0, 0.0), repeats_step=True)

    @classmethod
    def of_run(
        cls, step_s: Sequence[float], lost_at: Iterable[int], *, aftermath: int,
        base: Sequence[float] | None = None,
    ) -> Parts:  # fmt: skip
        """Of a run with losses before some steps, whose effect lasts `aftermath` steps.

        `base` is a run without any; without it, the other steps of the same run say what a
        step takes.
        """
        lost = sorted(lost_at)
        disturbed = {at + offset for at in lost for offset in range(aftermath)}
        usual = list(base) if base is not None else _smooth(step_s, disturbed)
        costs = []
        for at, following in zip(lost, [*lost[1:], len(step_s)], strict=True):
            end = min(at + aftermath, following)
            costs.append((at, sum(step_s[at:end]) - sum(_smooth(usual, set())[at:end])))
        return cls(step_s=tuple(usual), loss_line=_line(costs))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to go on after failures."""

    name: str
    parts: Parts
    restarts: bool = False
    """Whether a failure means to begin again."""
    run: Sequence[float] | None = None
    """Step times of its real run with failures."""


def mean_steps_per_s(method: Method, tokens: int, rate: float, seed: int) -> float | str:
    """Over many seeded generations of so many tokens; a text where it hardly ever ends."""
    runs = RUNS if rate else 1
    times = [
        _generation_s(method, tokens, rate, random.Random(f"{seed} {run}")) for run in range(runs)
    ]
    if median(times) > HOUR_S:
        return "not in 1 h"
    return tokens * runs / sum(times)


def _generation_s(method: Method, tokens: int, rate: float, rng: random.Random) -> float:
    """One generation; ends early when an hour is over."""
    parts, index, total_s = method.parts, 0, 0.0
    while index < tokens and total_s <= HOUR_S:
        if rng.random() < rate:
            total_s += 0.0 if method.restarts else parts.loss_s(index)
            index = 0 if method.restarts else index
        total_s += parts.step_s[index]
        index += 1
    return total_s


def _smooth(step_s: Sequence[float], without: set[int]) -> list[float]:
    """The median of the steps around each one, leaving some out."""
    found = []
    for index in range(len(step_s)):
        around = range(max(0, index - NEIGHBOURS), min(len(step_s), index + NEIGHBOURS + 1))
        kept = [step_s[at] for at in around if at not in without]
        found.append(median(kept or [step_s[at] for at in around]))
    return found


def _line(costs: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Through the measured costs; level if there are too few, never falling."""
    if not costs:
        return (0.0, 0.0)
    if len(costs) > 2:
        slope, start = linear_regression([at for at, _ in costs], [cost for _, cost in costs])
        if slope >= 0:
            return (start, slope)
    return (mean(cost for _, cost in costs), 0.0)


def _between(found: Sequence[tuple[int, float]], length: int) -> float:
    """Seconds at a length, on straight lines between the measured ones."""
    before = max((one for one in found if one[0] <= length), default=found[0])
    after = min((one for one in found if one[0] >= length), default=found[-1])
    if after[0] == before[0]:
        return before[1]
    share = (length - before[0]) / (after[0] - before[0])
    return before[1] + share * (after[1] - before[1])
