"""Training passes: what servers run for others' fine-tuning, and the contract of who runs it.

A pass takes a micro-batch of whole sequences through the blocks of a span, forward, and
backward if asked. Weights stay as they are; gradients are those of the rows that went in and
of small tensors that the pass brought along: prompts and LoRA matrices. Nothing is remembered
between passes that anything depends on. As with `shoal.base.backend`, values are bytes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from shoal.base.adapters import (
    ITEM_BYTES,
    AdapterConfig,
    AdapterEncoding,
    DropoutKey,
    LoraShape,
)
from shoal.base.spans import Span

Values = bytes | bytearray | memoryview

PROMPT_TOKENS_MAX: Final = 1024
"""Rows of a deep prompt: ten times what papers use."""

SEQUENCES_PER_PASS_MAX: Final = 1024
"""Sequences of one micro-batch: as many as a classifier's short texts fill a pass with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTensors:
    """What is trained inside one block."""

    index: int
    prompt_tokens: int = 0
    """Rows that are added to the first rows of every sequence where they enter the block."""
    lora: tuple[LoraShape, ...] = ()
    """Sorted by target."""

    def num_values(self, hidden_size: int, rank: int) -> int:
        """Values of all its tensors."""
        return self.prompt_tokens * hidden_size + sum(one.num_values(rank) for one in self.lora)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedSpec:
    """What is trained inside some blocks, without the numbers.

    As bytes: block by block the prompt (rows, hidden size), then of each layer A (rank,
    inputs) and B (outputs, rank), row by row, in `encoding`. Gradients lie in the same order,
    in float32.
    """

    config: AdapterConfig | None
    """Of the LoRA matrices; None: there are none."""
    encoding: AdapterEncoding
    blocks: tuple[BlockTensors, ...]
    """By rising index."""

    @property
    def rank(self) -> int:
        """Of the LoRA matrices; 0: there are none."""
        return 0 if self.config is None else self.config.rank

    @property
    def prompt_tokens(self) -> int:
        """Rows that every sequence must have."""
        return max((block.prompt_tokens for block in self.blocks), default=0)

    def within(self, span: Span) -> TrainedSpec:
        """The part that lies in the blocks of `span`."""
        blocks = tuple(block for block in self.blocks if block.index in span)
        return TrainedSpec(config=self.config, encoding=self.encoding, blocks=blocks)

    def block_bytes(self, block: BlockTensors, hidden_size: int) -> int:
        """Bytes of one block's tensors."""
        return block.num_values(hidden_size, self.rank) * ITEM_BYTES[self.encoding]

    def num_bytes(self, hidden_size: int) -> int:
        """Bytes of all tensors."""
        return sum(self.block_bytes(block, hidden_size) for block in self.blocks)

    def parts(self, values: Values, hidden_size: int) -> Iterator[tuple[BlockTensors, memoryview]]:
        """Each block with its share of the tensors' bytes, uncopied."""
        view, at = memoryview(values), 0
        for block in self.blocks:
            end = at + self.block_bytes(block, hidden_size)
            yield block, view[at:end]
            at = end


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTensors:
    """What is trained inside blocks, with the numbers."""

    spec: TrainedSpec
    values: Values


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a pass' dropout is drawn from: the same for every server that repeats it."""

    key: DropoutKey
    first_sequence: int = 0
    """Number of the pass' first sequence in the whole batch; the others follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassWork:
    """One micro-batch for one span. Sequences begin at position 0 and lie one after the other."""

    span: Span
    lengths: tuple[int, ...]
    """Positions of each sequence."""
    rows: Values
    """Hidden states that enter the span, in `encoding`."""
    encoding: str
    """Of rows in and out, and of their gradients."""
    trained: TrainedTensors | None = None
    draw: Draw | None = None
    """None: no dropout, whatever the adapter's options say."""

    @property
    def num_rows(self) -> int:
        """Rows of all sequences."""
        return sum(self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassGradients:
    """What a backward pass gives."""

    rows: bytes
    """Of the rows that went in, in the work's encoding."""
    tensors: Values
    """Of the trained tensors, in float32; empty where there are none."""


class TrainingPass(Protocol):
    """A micro-batch on its way through a span, one block per step.

    Forward steps, `output`, `turn`, backward steps, `gradients`; then `close`, which may come
    at any time between steps.
    """

    @property
    def steps_left(self) -> int:
        """Steps to the end of this direction."""

    @property
    def held_bytes(self) -> int:
        """Memory that it keeps for the way back."""

    async def step(self) -> None:
        """Run one block.

        Raises:
            BadInput, AdapterBad: rows that can't be, at the first step, or tensors of the
                block.
            BadOutput: good values gave such as can't be.
        """

    def output(self) -> bytes:
        """The rows that leave the span. Only once, when forward steps are done."""

    def turn(self, gradients: Values) -> None:
        """Go back, from the gradients of the rows that left. Only once, after the last step."""

    def gradients(self) -> PassGradients:
        """What came of it. Only once, when backward steps are done."""

    def narrow(self) -> int:
        """Hold no more graphs than now; returns what it holds at the most from now on."""

    def close(self) -> None:
        """Free everything. Idempotent."""


class BlockTrainer(Protocol):
    """Runs training passes. Its steps and a backend's runs never overlap."""

    def least_bytes(self, work: PassWork) -> int:
        """Memory that a way back of `work` holds at the least, over blocks that are here."""

    def begin(self, work: PassWork, *, is_for_backward: bool, held_bytes_max: int) -> TrainingPass:
        """A pass at its start; nothing is computed yet.

        What blocks compute is kept for the way back while it fits into `held_bytes_max`, with
        the rows that enter all of them; of the others only these rows, and they are run again.
        The gradients are the same.

        Raises:
            BadInput: a span, lengths, sizes or an encoding that can't be.
            AdapterBad: layers that these blocks don't have, or of other shapes.
        """
