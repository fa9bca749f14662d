"""A batch on its way through the swarm, and gradients on their way back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from shoal.base.adapters import DropoutKey
from shoal.base.spans import Span
from shoal.base.training import TrainedTensors, Values
from shoal.plan.view import Stage

HELD_BYTES_MAX: Final = 128 << 20
"""Gradients that wait for those of earlier micro-batches: beyond it, no later ones are begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Whole sequences for the blocks of a span, one after the other."""

    span: Span
    lengths: tuple[int, ...]
    rows: Values
    encoding: str
    trained: TrainedTensors | None = None
    """Within the span."""
    key: DropoutKey | None = None
    """None: no dropout."""


@dataclass(slots=True, kw_only=True)
class Leg:
    """A server's part of a micro-batch's way."""

    stage: Stage
    rows: Values
    """What entered it."""
    number: int = 0
    """Of the pass at the server."""
    generation: int = 0
    """Of the stream that it came on; 0: it was never run."""
    is_kept: bool = False


@dataclass(slots=True, kw_only=True)
class Part:
    """A micro-batch, and the way that it took."""

    first: int
    """Its first sequence."""
    lengths: tuple[int, ...]
    rows: Values
    """What enters the span."""
    first_row: int = 0
    """Where they begin in the batch."""
    legs: list[Leg] = field(default_factory=list)
    output: bytes = b""


@dataclass(slots=True, kw_only=True)
class Trail:
    """A batch that went forward: what a way back needs."""

    batch: Batch
    parts: list[Part]

    @property
    def output(self) -> bytes:
        """The rows that left the span."""
        return b"".join(part.output for part in self.parts)

    @property
    def stages(self) -> tuple[tuple[Stage, ...], ...]:
        """Which servers ran each micro-batch."""
        return tuple(tuple(leg.stage for leg in part.legs) for part in self.parts)


AddGradients = Callable[[int, bytes], None]
"""Told, for each micro-batch in order, the float32 gradients of one block's tensors."""

Found = list[tuple[int, bytes]]
"""Blocks, and the gradients of their tensors."""


class InOrder:
    """Hands gradients on in the order of micro-batches, in whichever they come."""

    def __init__(self, firsts: Iterable[int], add: AddGradients) -> None:
        self._left = deque(firsts)
        self._add = add
        self._held: dict[int, Found] = {}
        self._moved = asyncio.Event()

    async def room(self) -> None:
        """Until little waits for its turn. Who is next must have begun already."""
        while self._held_bytes() > HELD_BYTES_MAX:
            self._moved.clear()
            await self._moved.wait()

    def came(self, first: int, found: Found) -> None:
        """Those of the micro-batch that begins with sequence `first`."""
        self._held[first] = found
        while self._left and self._left[0] in self._held:
            for block, tensors in self._held.pop(self._left.popleft()):
                self._add(block, tensors)
        self._moved.set()

    def _held_bytes(self) -> int:
        return sum(len(tensors) for found in self._held.values() for _, tensors in found)
