"""Toy training passes: hashes forward and back, so that any wrong byte changes what comes out.

Forward, sequences go through toy blocks whose salt is the block's trained tensors. Back, the
gradient of what entered a block is a hash of the gradient of what left it, of the rows that
entered it, and of the tensors. So gradients prove that servers had the right inputs, whoever
ran what before.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from shoal.base.backend import BackendFacts
from shoal.base.errors import AdapterBad, BadInput, BadOutput, InternalError
from shoal.base.spans import Span
from shoal.base.training import PassGradients, PassWork, Values
from shoal.lab.toy_blocks import (
    HIDDEN_SIZE,
    TOY_LAYER,
    ToySequence,
    decode_rows,
    encode_rows,
    finite_row,
    is_finite,
)
from shoal.wire.tensors import check_payload, row_bytes

TrainingFault = Literal["raise", "bad", "poison", "wrong"]
"""raise: an exception. bad: BadOutput. poison: NaN comes out. wrong: a value is altered."""

StepPace = Callable[[int], Awaitable[None]]
"""Awaited before each step of so many rows."""

_HELD_BYTES_PER_ROW: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyResult:
    """What a pass gives, all in float32."""

    rows: bytes
    row_gradients: bytes
    tensor_gradients: bytes
    """Block by block, as long as its tensors have values."""


def toy_block(
    block: int, lengths: Sequence[int], rows: bytes, salt: bytes, hidden_size: int = HIDDEN_SIZE
) -> bytes:
    """The float32 rows that leave a block."""
    step, at, left = row_bytes("float32", hidden_size), 0, []
    contents = {block: hashlib.blake2b(salt, digest_size=16).digest()} if salt else {}
    for length in lengths:
        sequence = ToySequence(Span(block, block + 1), hidden_size, contents)
        for _ in range(length):
            left.append(sequence.push(rows[at : at + step]))
            at += step
    return b"".join(left)


def toy_block_back(
    block: int, entered: bytes, gradients: bytes, salt: bytes, hidden_size: int = HIDDEN_SIZE
) -> bytes:
    """The gradients of the rows that entered a block."""
    step = row_bytes("float32", hidden_size)
    person = block.to_bytes(8, "little")
    key = hashlib.blake2b(entered + salt, digest_size=16, person=person).digest()
    return b"".join(
        finite_row(
            hashlib.blake2b(gradients[at : at + step], digest_size=16, key=key).digest(), step
        )
        for at in range(0, len(gradients), step)
    )


def toy_tensor_gradients(
    block: int, num_values: int, entered: bytes, gradients: bytes, salt: bytes
) -> bytes:
    """The gradients of a block's tensors."""
    said = hashlib.blake2b(entered + gradients + salt, digest_size=16).digest()
    return finite_row(said + block.to_bytes(8, "little"), 4 * num_values)


def toy_pass(work: PassWork, gradients: bytes, hidden_size: int = HIDDEN_SIZE) -> ToyResult:
    """What a float32 pass gives, wherever and in how many parts it is run."""
    rows, entered = bytes(work.rows), []
    blocks = range(work.span.start, work.span.end)
    salts = _salts(work, hidden_size)
    for block in blocks:
        entered.append(rows)
        rows = toy_block(block, work.lengths, rows, salts.get(block, b""), hidden_size)
    back, tensors = gradients, []
    for block, before in zip(reversed(blocks), reversed(entered), strict=True):
        salt = salts.get(block, b"")
        if salt:
            count = _num_values(work, block, hidden_size)
            tensors.append(toy_tensor_gradients(block, count, before, back, salt))
        back = toy_block_back(block, before, back, salt, hidden_size)
    return ToyResult(rows=rows, row_gradients=back, tensor_gradients=b"".join(reversed(tensors)))


class ToyTrainer:
    """`shoal.base.training.BlockTrainer` for toy blocks. No torch, no threads."""

    def __init__(
        self,
        facts: Callable[[], BackendFacts],
        *,
        pace: StepPace | None = None,
        fault: Callable[[PassWork, int], TrainingFault | None] | None = None,
    ) -> None:
        """`fault` is asked at each step, with the block."""
        self.steps: list[tuple[float, float]] = []
        """When each step began and ended."""
        self.num_open = 0
        self._facts = facts
        self._pace = pace
        self._fault = fault

    @property
    def facts(self) -> BackendFacts:
        """Of the backend."""
        return self._facts()

    def least_bytes(self, work: PassWork) -> int:
        """See BlockTrainer; all that a pass holds here."""
        return _HELD_BYTES_PER_ROW * work.num_rows * len(work.span)

    def begin(self, work: PassWork, *, is_for_backward: bool, held_bytes_max: int) -> _ToyPass:
        """See BlockTrainer."""
        facts = self.facts
        if not len(work.span) or not facts.span.covers(work.span):
            raise BadInput(f"blocks {work.span} are not a part of {facts.span}")
        check_payload(work.encoding, facts.hidden_size, work.num_rows, memoryview(work.rows).nbytes)
        for block in () if work.trained is None else work.trained.spec.blocks:
            for one in block.lora:
                if (one.target, one.inputs, one.outputs) != (
                    TOY_LAYER, facts.hidden_size, facts.hidden_size,
                ):  # fmt: skip
                    raise AdapterBad(f"toy blocks have one layer {TOY_LAYER}, not {one}")
        self.num_open += 1
        return _ToyPass(self, work, is_for_backward, held_bytes_max)

    async def wait(self, work: PassWork, block: int) -> TrainingFault | None:
        """Take a step's time."""
        now = asyncio.get_running_loop().time
        began_s = now()
        if self._pace is not None:
            await self._pace(work.num_rows)
        self.steps.append((began_s, now()))
        return None if self._fault is None else self._fault(work, block)


@dataclass(slots=True)
class _ToyPass:
    """`shoal.base.training.TrainingPass`."""

    _trainer: ToyTrainer
    _work: PassWork
    _is_for_backward: bool
    _held_bytes_max: int
    _rows: bytes = b""
    _entered: list[tuple[int, bytes]] = field(default_factory=list)
    _salts: dict[int, bytes] = field(default_factory=dict)
    _tensors: list[bytes] = field(default_factory=list)
    _next: int | None = None
    _is_turned: bool = False
    _is_closed: bool = False
    _is_poisoned: bool = False
    """NaN goes through all blocks that follow."""

    @property
    def steps_left(self) -> int:
        """Blocks to the end of this direction."""
        if self._is_turned:
            return len(self._entered)
        span = self._work.span
        return span.end - (span.start if self._next is None else self._next)

    @property
    def held_bytes(self) -> int:
        """A made-up size."""
        return _HELD_BYTES_PER_ROW * self._work.num_rows * len(self._entered)

    async def step(self) -> None:
        """Run one block, or undo one."""
        if self._is_closed or not self.steps_left:
            raise InternalError("a step of a pass that is over")
        work, size = self._work, self._trainer.facts.hidden_size
        if self._next is None:
            self._next, self._rows = work.span.start, self._read(work.rows)
            self._salts = _salts(work, size)
        block = self._entered[-1][0] if self._is_turned else self._next
        fault = await self._trainer.wait(work, block)
        if fault == "raise":
            raise RuntimeError(f"injected at block {block}")
        if fault == "bad":
            raise BadOutput(f"injected at block {block}")
        salt = self._salts.get(block, b"")
        if self._is_turned:
            _, entered = self._entered.pop()
            if salt:
                count = _num_values(work, block, size)
                self._tensors.append(toy_tensor_gradients(block, count, entered, self._rows, salt))
            self._rows = toy_block_back(block, entered, self._rows, salt, size)
        else:
            if self._is_for_backward:
                self._entered.append((block, self._rows))
            self._rows = toy_block(block, work.lengths, self._rows, salt, size)
            self._next = block + 1
        self._is_poisoned = self._is_poisoned or fault == "poison"
        if fault == "wrong":
            self._rows = bytes([self._rows[0] ^ 1]) + self._rows[1:]

    def output(self) -> bytes:
        """The rows that left."""
        return self._encoded()

    def turn(self, gradients: Values) -> None:
        """Go back."""
        if self._is_turned or self.steps_left or not self._is_for_backward:
            raise InternalError("a pass turned that can't")
        self._rows, self._is_turned = self._read(gradients), True

    def gradients(self) -> PassGradients:
        """What came of it."""
        return PassGradients(rows=self._encoded(), tensors=b"".join(reversed(self._tensors)))

    def narrow(self) -> int:
        """What is held grows with the blocks, whatever the limit."""
        if not self._is_for_backward or self._is_turned:
            return self.held_bytes
        return self._trainer.least_bytes(self._work)

    def close(self) -> None:
        """Free everything."""
        if not self._is_closed:
            self._is_closed = True
            self._trainer.num_open -= 1

    def _encoded(self) -> bytes:
        rows = b"\xff" * len(self._rows) if self._is_poisoned else self._rows
        return encode_rows(rows, self._work.encoding)

    def _read(self, values: Values) -> bytes:
        rows = decode_rows(bytes(values), self._work.encoding)
        if not is_finite(rows):
            raise BadInput("rows of training hold values that are not finite")
        return rows


def _salts(work: PassWork, hidden_size: int) -> dict[int, bytes]:
    """The bytes of each block's tensors."""
    if work.trained is None:
        return {}
    parts = work.trained.spec.parts(work.trained.values, hidden_size)
    draw = b"" if work.draw is None else repr(work.draw).encode()
    return {block.index: bytes(values) + draw for block, values in parts}


def _num_values(work: PassWork, block: int, hidden_size: int) -> int:
    if work.trained is None:
        raise InternalError("no tensors")
    spec = work.trained.spec
    return next(one.num_values(hidden_size, spec.rank) for one in spec.blocks if one.index == block)
