"""Messages of training streams: trained tensors, passes through blocks, and what comes of them.

What a message announces follows in `Chunk` frames with its call's number, and nothing else
does: its size is checked when it is announced. See docs/protocol.md.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from shoal.base.adapters import FEATURES_MAX, RANK_MAX, TARGET_CHARS_MAX, TARGETS_MAX
from shoal.base.limits import SESSION_TOKENS_MAX
from shoal.base.training import PROMPT_TOKENS_MAX, SEQUENCES_PER_PASS_MAX
from shoal.wire.fields import Block, Content, Count, Name, WireMessage

CHUNK_BYTES_MAX: Final = 256 << 10
"""As pieces of weights: rows of sessions never wait long behind one."""

TRAINING_BLOCKS_MAX: Final = 1024
"""Blocks in one message: several times the deepest models."""

PASSES_FORGOTTEN_MAX: Final = 1024

Features = Annotated[int, msgspec.Meta(ge=1, le=FEATURES_MAX)]
Length = Annotated[int, msgspec.Meta(ge=1, le=SESSION_TOKENS_MAX)]


class TargetShape(WireMessage, frozen=True):
    """A layer that is trained by two matrices: A (rank, inputs) and B (outputs, rank)."""

    target: Annotated[str, msgspec.Meta(max_length=TARGET_CHARS_MAX)]
    inputs: Features
    outputs: Features


class BlockShape(WireMessage, frozen=True):
    """What is trained inside one block: a prompt of so many rows, and layers."""

    index: Block
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0, le=PROMPT_TOKENS_MAX)]
    layers: Annotated[list[TargetShape], msgspec.Meta(max_length=TARGETS_MAX)]


class PutTensors(WireMessage, tag=50, frozen=True):
    """Trained tensors under a name of the client's choice; the answer is Done.

    Their bytes: block by block the prompt, then each layer's A and B, row by row, in
    `encoding`. `rank` is 0 where no layer is trained.
    """

    call: Count
    name: Content
    encoding: Name
    rank: Annotated[int, msgspec.Meta(ge=0, le=RANK_MAX)]
    alpha: Annotated[float, msgspec.Meta(ge=0, le=1e9)]
    dropout: Annotated[float, msgspec.Meta(ge=0, le=1)]
    use_rslora: bool
    blocks: Annotated[list[BlockShape], msgspec.Meta(min_length=1, max_length=TRAINING_BLOCKS_MAX)]
    num_bytes: Count


class Drawn(WireMessage, frozen=True):
    """What a pass' dropout is drawn from."""

    seed: Count
    step: Count
    first_sequence: Count


class Micro(WireMessage, frozen=True):
    """A micro-batch: whole sequences, one after the other, for blocks [start, end)."""

    start: Block
    end: Block
    lengths: Annotated[list[Length], msgspec.Meta(min_length=1, max_length=SEQUENCES_PER_PASS_MAX)]
    encoding: Name
    tensors: Annotated[bytes, msgspec.Meta(max_length=16)] = b""
    """The name they were put under; empty: none."""
    drawn: Drawn | None = None


class Forward(WireMessage, tag=51, frozen=True):
    """Run a micro-batch; its rows follow, the answer is Done and the rows that left.

    `number` names the pass on this stream. With `is_kept` the server may keep what it computed
    for the way back; nothing depends on it.
    """

    call: Count
    number: Count
    micro: Micro
    is_kept: bool
    num_bytes: Count


class Backward(WireMessage, tag=52, frozen=True):
    """The way back of a pass; the answer is Done, the gradients of its rows and tensors.

    What follows: the gradients of the rows that left and, with `has_rows`, then the rows that
    entered. Without them the server answers with the error `lost` unless it kept the pass.
    """

    call: Count
    number: Count
    micro: Micro
    has_rows: bool
    num_bytes: Count


class Forget(WireMessage, tag=53, frozen=True):
    """These passes won't come back: free what is kept of them, and don't begin them."""

    numbers: Annotated[list[Count], msgspec.Meta(max_length=PASSES_FORGOTTEN_MAX)]


class Chunk(WireMessage, tag=54, frozen=True):
    """The bytes from `offset` on of what a call announced are the frame's payload."""

    call: Count
    offset: Count


class Done(WireMessage, tag=55, frozen=True):
    """The answer to a call: rows, then gradients of tensors in float32; both follow."""

    call: Count
    rows_bytes: Count = 0
    tensors_bytes: Count = 0


class Training(WireMessage, tag=56, frozen=True):
    """A sign of life while calls are open; `steps` moves whenever the server computes."""

    steps: Count
