"""The loss of a training run as a curve: in text for a terminal, as PNG with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shoal.hf.tuning_checkpoint import History

WORSE: Final = 1.1
WORSE_BY: Final = 0.05
"""A loss that ends so many times as high as it began, and by so much higher, got worse."""

WIDTH: Final = 60
HEIGHT: Final = 12

_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of Braille patterns: 4 rows of 2 dots a character."""

_BRAILLE: Final = 0x2800


def text_curve(losses: Sequence[float], width: int = WIDTH, height: int = HEIGHT) -> str:
    """Losses over steps, from the first to the last, drawn with Braille dots.

    More steps than dots are averaged.
    """
    if not losses:
        return "(no steps yet)"
    columns = min(len(losses), 2 * width)
    values = [_mean(losses, column, columns) for column in range(columns)]
    low, high = min(values), max(values)
    rows = 4 * height
    cells = [[0] * width for _ in range(height)]
    before: int | None = None
    for at in range(2 * width):
        share = (_between(values, at / (2 * width - 1)) - low) / (high - low) if high > low else 0.5
        row = min(rows - 1, int((1.0 - share) * (rows - 1) + 0.5))
        for dot in range(min(row, row if before is None else before), max(row, before or row) + 1):
            cells[dot // 4][at // 2] |= _DOTS[dot % 4][at % 2]
        before = row
    lines = ["".join(chr(_BRAILLE + cell) for cell in row) for row in cells]
    scale = [f"{high:8.4f} "] + [" " * 9] * (height - 2) + [f"{low:8.4f} "]
    drawn = [f"{label}|{line}" for label, line in zip(scale, lines, strict=True)]
    foot = " " * 9 + "+" + "-" * width
    steps = f"{'':10}1{len(losses):>{width - 1}} steps"
    return "\n".join([*drawn, foot, steps])


def draw_curve(history: History, path: Path, title: str) -> bool:
    """Draw losses and evaluations to a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    losses = [one.loss for one in history.steps]
    axes.plot(range(1, len(losses) + 1), losses, color="#c6d5e6", label="training, each step")
    smooth = smoothed(losses)
    axes.plot(range(1, len(smooth) + 1), smooth, color="#4c78a8", label="training, smoothed")
    if history.evaluations:
        at = [one.step for one in history.evaluations]
        shown = [one.loss for one in history.evaluations]
        axes.plot(at, shown, "o-", color="#e45756", label="evaluation")
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential averages over about a twentieth of the run, without their early bias."""
    weight = 1.0 - 1.0 / max(1.0, len(losses) / 20)
    total, mass, found = 0.0, 0.0, []
    for loss in losses:
        total = weight * total + (1.0 - weight) * loss
        mass = weight * mass + (1.0 - weight)
        found.append(total / mass)
    return found


def worsened(history: History) -> tuple[float, float] | None:
    """The loss at the beginning and at the end, if it rose beyond what single batches differ by.

    That of evaluations where there was one before the end, else of the first and last twentieth.
    """
    found = [one.loss for one in history.evaluations]
    if len(found) > 1:
        first, last = found[0], found[-1]
    else:
        losses = [one.loss for one in history.steps]
        if len(losses) < 2:
            return None
        first, last = _mean(losses, 0, min(20, len(losses))), smoothed(losses)[-1]
    return (first, last) if last > max(WORSE * first, first + WORSE_BY) else None


def _between(values: Sequence[float], share: float) -> float:
    """The value at a share of the way from the first to the last."""
    place = share * (len(values) - 1)
    left = min(int(place), max(0, len(values) - 2))
    right = min(left + 1, len(values) - 1)
    return values[left] + (place - left) * (values[right] - values[left])


def _mean(losses: Sequence[float], column: int, columns: int) -> float:
    start = column * len(losses) // columns
    end = max(start + 1, (column + 1) * len(losses) // columns)
    return math.fsum(losses[start:end]) / (end - start)
