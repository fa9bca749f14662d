"""Half-open ranges of blocks, `[start, end)`, and the little algebra that chains need."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.base.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Blocks `start`, ..., `end - 1`. May be empty (`start == end`): a border."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"not a span: [{self.start}, {self.end})")

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.end

    def __str__(self) -> str:
        return f"[{self.start},{self.end})"

    def covers(self, other: Span) -> bool:
        """Whether every block of `other` is one of ours."""
        return self.start <= other.start and other.end <= self.end

    def overlap(self, other: Span) -> Span | None:
        """The blocks in both, or None when there are none."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Span(start, end) if start < end else None


def parse_span(text: str) -> Span:
    """`"A:B"` as a span.

    Raises:
        ConfigError: not two whole numbers with A < B.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise ConfigError(f"not a span of blocks: {text!r} (write START:END, for example 0:12)")
    start, end = int(match[1]), int(match[2])
    if start >= end:
        raise ConfigError(f"empty span of blocks: {text!r} (START must be below END)")
    return Span(start, end)


def missing_blocks(wanted: Span, held: Iterable[Span]) -> list[Span]:
    """The parts of `wanted` that no span of `held` covers, in order."""
    missing: list[Span] = []
    position = wanted.start
    for span in sorted(held):
        if span.end <= position or not len(span):
            continue
        if span.start >= wanted.end:
            break
        if span.start > position:
            missing.append(Span(position, span.start))
        position = max(position, span.end)
    if position < wanted.end:
        missing.append(Span(position, wanted.end))
    return missing
