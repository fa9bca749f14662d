"""Training passes on torch: transformers' own blocks, their autograd, one block at a time.

Each block's graph ends at the rows that entered it, so that it can be run, and undone, by
itself: decode iterations go in between. Weights are frozen; their memory is shared with
inference. Works with both engines.
Shapes: T rows of a micro-batch, D hidden size, B sequences of equal length, S positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final, Protocol, TypeVar

import torch

from shoal.base.adapters import RowRun
from shoal.base.backend import BackendFacts
from shoal.base.errors import BadInput, BadOutput, InternalError, ShoalError
from shoal.base.spans import Span
from shoal.base.training import BlockTensors, PassGradients, PassWork, TrainingPass, Values
from shoal.model.device_thread import DeviceThread
from shoal.model.lora import LoraDropout, lora_in
from shoal.model.onednn_linear import OneDnnLinear
from shoal.model.rows import all_finite, rows_from_bytes, rows_to_bytes, tensor_bytes
from shoal.model.span_model import SpanModel
from shoal.model.training_memory import HeldCount, leave_inference
from shoal.model.training_tensors import (
    BlockParts,
    check_shapes,
    read_parts,
    values_of,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

TRANSPOSED_BYTES_MAX: Final = 2 << 30
"""Weights that are held a second time for backward passes, at most; beyond it they are turned
again for every pass, which takes half as long again."""


KINDS_MAX: Final = 4096
"""Kinds of blocks and tensors whose graphs' memory is remembered: ranks can be chosen freely."""

Kind = tuple[int, int, int, bool, BlockTensors | None]
"""Block, magnitude of lengths, rank, whether there is dropout, and what is trained."""


class WholeRunner(Protocol):
    """Runs blocks for whole sequences, differentiable."""

    def run_whole(self, hidden: torch.Tensor, lengths: Sequence[int], span: Span) -> torch.Tensor:
        """(T, D) of (T, D) rows of sequences that lie one after the other."""


class AloneRunner:
    """By transformers' own attention: sequences of equal length are a batch."""

    def __init__(self, model: SpanModel) -> None:
        self._model = model

    def run_whole(self, hidden: torch.Tensor, lengths: Sequence[int], span: Span) -> torch.Tensor:
        """As `WholeRunner`; all lengths must be equal."""
        count = len(lengths)
        batch = hidden.view(count, hidden.shape[0] // count, hidden.shape[1])
        return self._model.forward_whole(batch, span).flatten(0, 1)


@dataclass(slots=True, kw_only=True)
class _Ran:
    """A block that rows went through, to be undone."""

    block: int
    entered: torch.Tensor
    """(T, D) rows; wants gradients."""
    left: torch.Tensor | None = None
    """(T, D) rows with their graph; None: to be run again."""
    parts: BlockParts | None = None
    """What is trained inside it, as the graph has it."""
    graph_bytes: int = 0
    """Of the graph and of these tensors."""


class TorchTrainer:
    """`shoal.base.training.BlockTrainer` of one backend."""

    def __init__(
        self,
        model: SpanModel,
        facts: Callable[[], BackendFacts],
        device: str,
        thread: DeviceThread,
        *,
        runner: WholeRunner,
        is_packed: bool,
    ) -> None:
        self.model = model
        self.device = device
        self.runner = runner
        self.is_packed = is_packed
        """Whether the runner takes sequences of different lengths at once."""
        self.weights: frozenset[int] = frozenset()
        """Where the memory of all weights begins."""
        self.row_bytes: dict[Kind, float] = {}
        """What graphs hold per row, trained tensors aside."""
        self._facts = facts
        self._thread = thread
        self._is_ready = False
        self.transposed_bytes = 0
        """What of the weights is held a second time."""

    @property
    def facts(self) -> BackendFacts:
        """Of the backend."""
        return self._facts()

    def least_bytes(self, work: PassWork) -> int:
        """See BlockTrainer: the rows that enter each block."""
        row = self.facts.hidden_size * self.model.dtype.itemsize
        return work.num_rows * row * len(work.span)

    def begin(self, work: PassWork, *, is_for_backward: bool, held_bytes_max: int) -> TrainingPass:
        """See BlockTrainer."""
        self._check(work)
        if work.trained is not None:
            check_shapes(work.trained, self.model)
        return _Pass(self, work, is_for_backward=is_for_backward, held_bytes_max=held_bytes_max)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` on the device thread, where gradients can be had."""

        def outside_inference() -> T:
            with torch.inference_mode(False):
                self._prepare()
                return work()

        return await self._thread.run(outside_inference)

    def prepare_gradients(self, block: int) -> None:
        """Hold a block's weights transposed, while there is room for it."""
        for module in self.model.block(block).modules():
            if isinstance(module, OneDnnLinear) and self.transposed_bytes < TRANSPOSED_BYTES_MAX:
                self.transposed_bytes += module.keep_transposed()

    def _check(self, work: PassWork) -> None:
        facts = self.facts
        if not len(work.span) or not facts.span.covers(work.span):
            raise BadInput(f"blocks {work.span} are not a part of {facts.span}")
        if not work.lengths or min(work.lengths) < 1:
            raise BadInput("a pass needs sequences of at least 1 position")
        if max(work.lengths) > facts.session_tokens_max:
            raise BadInput(f"the model ends at {facts.session_tokens_max} positions")
        if work.encoding not in facts.encodings:
            raise BadInput(f"unknown encoding {work.encoding!r}")

    def _prepare(self) -> None:
        if self._is_ready:
            return
        modules = [self.model.base, *self.model.blocks()]
        for module in modules:
            leave_inference(module)
        weights = [weight for module in modules for weight in module.parameters()]
        self.weights = frozenset(
            weight.untyped_storage().data_ptr()
            for weight in weights
            if weight.layout == torch.strided
        )
        # Blocks that another backend trained before may hold theirs already.
        self.transposed_bytes = sum(
            module.transposed_bytes
            for block in self.model.blocks()
            for module in block.modules()
            if isinstance(module, OneDnnLinear)
        )
        self._is_ready = True


class _Pass:
    """`shoal.base.training.TrainingPass`."""

    def __init__(
        self, trainer: TorchTrainer, work: PassWork, *, is_for_backward: bool, held_bytes_max: int
    ) -> None:
        self._trainer = trainer
        self._work = work
        self._is_for_backward = is_for_backward
        self._held_bytes_max = held_bytes_max
        self._values = values_of(work, trainer.facts.hidden_size)
        self._least_bytes = trainer.least_bytes(work)
        self._graph_bytes = 0
        self._next = work.span.start
        self._rows: torch.Tensor | None = None
        """(T, D) where the pass is now: rows on the way out, their gradients on the way back."""
        self._ran: list[_Ran] = []
        self._grads: Values | None = None
        self._answer: bytes | None = None
        self._found: torch.Tensor | None = None
        """(N,) gradients of all trained values, block by block."""
        self._is_turned = False
        self._input_bytes = 0

    @property
    def steps_left(self) -> int:
        """Blocks to the end of this direction."""
        return len(self._ran) if self._is_turned else self._work.span.end - self._next

    @property
    def held_bytes(self) -> int:
        """Of graphs and of rows that entered blocks."""
        return self._graph_bytes + self._input_bytes

    async def step(self) -> None:
        """Run one block, or undo one."""
        if not self.steps_left:
            raise InternalError("a step beyond the end of a training pass")
        await self._trainer.run(self._guarded(self._back if self._is_turned else self._out))

    def output(self) -> bytes:
        """The rows that left the span."""
        if self._answer is None or self._is_turned:
            raise InternalError("output of a pass that isn't through")
        answer, self._answer = self._answer, None
        return answer

    def turn(self, gradients: Values) -> None:
        """Go back; the gradients are looked at by the first step."""
        if self._rows is None or self.steps_left or self._is_turned or not self._is_for_backward:
            raise InternalError("a pass turned that can't")
        self._is_turned, self._grads, self._answer = True, gradients, None

    def gradients(self) -> PassGradients:
        """What came of it."""
        if not self._is_turned or self._answer is None:
            raise InternalError("gradients of a pass that isn't through")
        answer, self._answer = self._answer, None
        tensors = b"" if self._found is None else tensor_bytes(self._found)
        return PassGradients(rows=answer, tensors=tensors)

    def narrow(self) -> int:
        """See TrainingPass. Between steps."""
        if not self._is_for_backward or self._is_turned:
            return self.held_bytes
        self._held_bytes_max = self._graph_bytes + self._least_bytes
        return self._held_bytes_max

    def close(self) -> None:
        """Free everything."""
        self._rows = self._grads = self._answer = self._found = None
        self._ran.clear()
        self._values.clear()
        self._graph_bytes = self._input_bytes = 0

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        """A failure of torch is that of these blocks with these rows."""

        def run() -> None:
            try:
                work()
            except ShoalError:
                raise
            except Exception as error:
                span = self._work.span
                _log.exception("training pass failed: span=%s rows=%d", span, self._work.num_rows)
                what = f"blocks {span} can't train: {type(error).__name__}: {error}"
                raise InternalError(what) from error

        return run

    def _out(self) -> None:
        rows = self._read() if self._rows is None else self._rows
        block, entered = self._next, rows.detach()
        parts = self._parts_of(block)
        if self._is_for_backward:
            entered.requires_grad_()
            ran = _Ran(block=block, entered=entered)
            left = self._run_held(ran, parts)
            self._input_bytes += entered.nbytes
            self._graph_bytes += ran.graph_bytes
            self._ran.append(ran)
        else:
            with torch.no_grad():
                left = self._run(block, entered, parts)
        self._rows, self._next = left.detach(), block + 1
        if not self.steps_left:
            if not all_finite(self._rows):
                raise self._bad_output("values")
            self._answer = self._encoded(self._rows, "rows")

    def _back(self) -> None:
        if self._grads is not None:
            self._rows = self._read_gradients(self._grads)
            self._grads = None
        ran = self._ran.pop()
        self._trainer.prepare_gradients(ran.block)
        left, parts = ran.left, ran.parts
        if left is None:
            parts = self._parts_of(ran.block)
            with torch.enable_grad():
                left = self._run(ran.block, ran.entered, parts)
        leaves = [] if parts is None else parts.leaves
        found = torch.autograd.grad(left, [ran.entered, *leaves], self._rows, allow_unused=True)
        gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip([ran.entered, *leaves], found, strict=True)
        ]
        self._rows = gradients[0]
        self._input_bytes -= ran.entered.nbytes
        self._graph_bytes -= ran.graph_bytes
        self._collect(ran.block, gradients[1:])
        if not self._ran:
            if not all_finite(self._rows):
                raise self._bad_output("gradients")
            self._answer = self._encoded(self._rows, "gradients")

    def _collect(self, block: int, gradients: Sequence[torch.Tensor]) -> None:
        """Put a block's gradients into their place."""
        if not gradients:
            return
        if self._found is None:
            count = sum(one.num_values for one in self._values.values())
            self._found = torch.empty(count, dtype=torch.float32)
        at = self._values[block].first
        for one in gradients:
            if not all_finite(one):
                raise self._bad_output("gradients")
            self._found[at : at + one.numel()] = one.flatten()
            at += one.numel()

    def _parts_of(self, block: int) -> BlockParts | None:
        """What is trained inside a block: read anew each time, as reading is cheap."""
        trained, values = self._work.trained, self._values.get(block)
        if trained is None or values is None:
            return None
        trainer = self._trainer
        return read_parts(values, trained.spec, trainer.facts.hidden_size, trainer.device)

    def _run(self, block: int, rows: torch.Tensor, parts: BlockParts | None) -> torch.Tensor:
        """(T, D) behind one block, with what is trained inside it."""
        if parts is not None and parts.prompt is not None:
            rows = _prompted(rows, parts.prompt, self._work.lengths)
        runner, span, outputs, at = self._trainer.runner, Span(block, block + 1), [], 0
        for first, lengths in self._groups():
            taken = rows[at : at + sum(lengths)]
            with self._lora(block, parts, first, lengths):
                outputs.append(runner.run_whole(taken, lengths, span))
            at += sum(lengths)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _groups(self) -> Iterator[tuple[int, list[int]]]:
        """Sequences that run together: the first one's place, and their lengths."""
        lengths = list(self._work.lengths)
        if self._trainer.is_packed:
            yield 0, lengths
            return
        first = 0
        for _, group in groupby(lengths):
            together = list(group)
            yield first, together
            first += len(together)

    def _lora(
        self, block: int, parts: BlockParts | None, first: int, lengths: Sequence[int]
    ) -> AbstractContextManager[None]:
        trained, draw = self._work.trained, self._work.draw
        if parts is None or trained is None or trained.spec.config is None or not parts.pairs:
            return nullcontext()
        config, dropout = trained.spec.config, None
        if draw is not None and config.dropout:
            first += draw.first_sequence
            runs = tuple(RowRun(first + n, 0, length) for n, length in enumerate(lengths))
            dropout = LoraDropout(probability=config.dropout, key=draw.key, block=block, runs=runs)
        return lora_in(self._trainer.model.block(block), parts.pairs, config.scale, dropout)

    def _run_held(self, ran: _Ran, parts: BlockParts | None) -> torch.Tensor:
        """(T, D) behind a block, whose graph `ran` holds from now on if there is room.

        Memory is counted the first time only: that takes a quarter of a block's time, so
        blocks that ran before are reckoned by what they took then.
        """
        known, rows = self._trainer.row_bytes, self._work.num_rows
        block, entered = ran.block, ran.entered
        kind, own_bytes = self._kind(block), 0 if parts is None else parts.num_bytes
        room = self._held_bytes_max - self._graph_bytes - self._least_bytes
        if own_bytes + int(known.get(kind, 0.0) * rows) > room or room <= 0:
            with torch.no_grad():
                return self._run(block, entered, parts)
        with torch.enable_grad():
            if kind in known:
                left = self._run(block, entered, parts)
            else:
                own = () if parts is None else parts.leaves
                places = {entered.untyped_storage().data_ptr()}
                places |= {leaf.untyped_storage().data_ptr() for leaf in own}
                count = HeldCount(self._trainer.weights | places)
                with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda one: one):
                    left = self._run(block, entered, parts)
                if len(known) >= KINDS_MAX:
                    known.clear()
                known[kind] = count.num_bytes / rows
        graph_bytes = own_bytes + int(known[kind] * rows)
        if graph_bytes <= room:  # else it was the first of its kind
            ran.left, ran.parts, ran.graph_bytes = left, parts, graph_bytes
        return left

    def _kind(self, block: int) -> Kind:
        longest = max(self._work.lengths).bit_length()  # attention may hold its scores
        trained, values = self._work.trained, self._values.get(block)
        if trained is None or values is None:
            return block, longest, 0, False, None
        return block, longest, trained.spec.rank, self._work.draw is not None, values.block

    def _read(self) -> torch.Tensor:
        rows = self._rows_of(self._work.rows)
        self._work = replace(self._work, rows=b"")  # the message's memory
        return rows

    def _read_gradients(self, values: Values) -> torch.Tensor:
        return self._rows_of(values)

    def _rows_of(self, values: Values) -> torch.Tensor:
        work, trainer = self._work, self._trainer
        read = rows_from_bytes(values, work.encoding, work.num_rows, trainer.facts.hidden_size)
        # Cloned where they would share the message's memory.
        rows = read.to(device=trainer.device, dtype=trainer.model.dtype, copy=True)
        if not all_finite(rows):
            raise BadInput(f"{work.num_rows} rows of training hold values that are not finite")
        return rows

    def _encoded(self, rows: torch.Tensor, what: str) -> bytes:
        try:
            return rows_to_bytes(rows, self._work.encoding)
        except BadInput as error:
            raise BadOutput(f"{what} of blocks {self._work.span}: {error.detail}") from error

    def _bad_output(self, what: str) -> BadOutput:
        return BadOutput(
            f"blocks {self._work.span} gave {what} that are not finite: a step that is too "
            f"large, or values too large for {self._trainer.facts.encodings[0]}"
        )


def _prompted(rows: torch.Tensor, prompt: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """(T, D) rows with a prompt (P, D) added to the first P rows of each sequence."""
    count, start, places = prompt.shape[0], 0, []
    for length in lengths:
        places.append(torch.arange(start, start + count, device=rows.device))
        start += length
    added = prompt.to(rows.dtype).repeat(len(lengths), 1)
    return rows.index_add(0, torch.cat(places), added)
