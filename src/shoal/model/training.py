"""Training passes on torch: transformers' own blocks, their autograd, one block at a time.

Each block's graph ends at the rows that entered it, so that it can be run, and undone, by
itself: decode iterations go in between. Weights are frozen; their memory is shared with
inference. Works with both engines.
Shapes: T rows of a micro-batch, D hidden size, B sequences of equal length, S positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Protocol, TypeVar

import torch

from shoal.base.adapters import RowRun
from shoal.base.backend import BackendFacts
from shoal.base.errors import BadInput, BadOutput, InternalError, ShoalError
from shoal.base.spans import Span
from shoal.base.training import PassGradients, PassWork, TrainingPass, Values
from shoal.model.device_thread import DeviceThread
from shoal.model.lora import LoraDropout, lora_in
from shoal.model.onednn_linear import OneDnnLinear
from shoal.model.rows import all_finite, rows_from_bytes, rows_to_bytes
from shoal.model.span_model import SpanModel
from shoal.model.training_memory import HeldCount, leave_inference
from shoal.model.training_tensors import BlockParts, check_shapes, parts_of

_log = logging.getLogger(__name__)

T = TypeVar("T")

TRANSPOSED_BYTES_MAX: Final = 2 << 30
"""Weights that are held a second time for backward passes, at most; beyond it they are turned
again for every pass, which takes half as long again."""


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
    left: torch.Tensor | None
    """(T, D) rows with their graph; None: to be run again."""


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
        self.row_bytes: dict[tuple[int, int, bool], float] = {}
        """What graphs hold per row: by block, magnitude of lengths, whether tensors are trained."""
        self._facts = facts
        self._thread = thread
        self._is_ready = False
        self._transposed_bytes = 0

    @property
    def facts(self) -> BackendFacts:
        """Of the backend."""
        return self._facts()

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
            if isinstance(module, OneDnnLinear) and self._transposed_bytes < TRANSPOSED_BYTES_MAX:
                self._transposed_bytes += module.keep_transposed()

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
        self._graph_bytes = 0
        self._next = work.span.start
        self._rows: torch.Tensor | None = None
        """(T, D) where the pass is now: rows on the way out, their gradients on the way back."""
        self._parts: dict[int, BlockParts] = {}
        self._ran: list[_Ran] = []
        self._grads: Values | None = None
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
        if self._rows is None or self.steps_left or self._is_turned:
            raise InternalError("output of a pass that isn't through")
        return self._encoded(self._rows, "rows")

    def turn(self, gradients: Values) -> None:
        """Go back; the gradients are looked at by the first step."""
        if self._rows is None or self.steps_left or self._is_turned or not self._is_for_backward:
            raise InternalError("a pass turned that can't")
        self._is_turned, self._grads = True, gradients

    def gradients(self) -> PassGradients:
        """What came of it."""
        if not self._is_turned or self._rows is None or self._ran:
            raise InternalError("gradients of a pass that isn't through")
        trained = self._work.trained
        blocks = () if trained is None else trained.spec.blocks
        tensors = b"".join(self._parts[block.index].gradient_bytes() for block in blocks)
        return PassGradients(rows=self._encoded(self._rows, "gradients"), tensors=tensors)

    def close(self) -> None:
        """Free everything."""
        self._rows = self._grads = None
        self._ran.clear()
        self._parts.clear()
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
        if self._rows is None:
            self._rows = self._read()
        block, entered = self._next, self._rows.detach()
        is_held = self._is_for_backward and self._graph_bytes < self._held_bytes_max
        if self._is_for_backward:
            entered.requires_grad_()
        with self._graph(block) if is_held else torch.no_grad():
            left = self._run(block, entered)
        if self._is_for_backward:
            self._input_bytes += entered.nbytes
            self._ran.append(_Ran(block=block, entered=entered, left=left if is_held else None))
        self._rows, self._next = left.detach(), block + 1
        if not self.steps_left and not all_finite(self._rows):
            raise self._bad_output("values")

    def _back(self) -> None:
        if self._grads is not None:
            self._rows = self._read_gradients(self._grads)
            self._grads = None
        ran = self._ran.pop()
        self._trainer.prepare_gradients(ran.block)
        left = ran.left
        if left is None:
            with torch.enable_grad():
                left = self._run(ran.block, ran.entered)
        parts = self._parts.get(ran.block)
        leaves = [] if parts is None else parts.leaves
        found = torch.autograd.grad(left, [ran.entered, *leaves], self._rows, allow_unused=True)
        gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip([ran.entered, *leaves], found, strict=True)
        ]
        self._rows = gradients[0]
        if parts is not None:
            parts.gradients = gradients[1:]
        if not self._ran and not self._is_finite():
            raise self._bad_output("gradients")

    def _run(self, block: int, rows: torch.Tensor) -> torch.Tensor:
        """(T, D) behind one block, with what is trained inside it."""
        parts = self._parts.get(block)
        if parts is not None and parts.prompt is not None:
            rows = _prompted(rows, parts.prompt, self._work.lengths)
        runner, span, outputs, at = self._trainer.runner, Span(block, block + 1), [], 0
        for first, lengths in self._groups():
            taken = rows[at : at + sum(lengths)]
            with self._lora(block, first, lengths):
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

    def _lora(self, block: int, first: int, lengths: Sequence[int]) -> AbstractContextManager[None]:
        parts, trained, draw = self._parts.get(block), self._work.trained, self._work.draw
        if parts is None or trained is None or trained.spec.config is None or not parts.pairs:
            return nullcontext()
        config, dropout = trained.spec.config, None
        if draw is not None and config.dropout:
            first += draw.first_sequence
            runs = tuple(RowRun(first + n, 0, length) for n, length in enumerate(lengths))
            dropout = LoraDropout(probability=config.dropout, key=draw.key, block=block, runs=runs)
        return lora_in(self._trainer.model.block(block), parts.pairs, config.scale, dropout)

    @contextmanager
    def _graph(self, block: int) -> Iterator[None]:
        """While inside, graphs are made; their memory is counted the first time.

        Counting takes a quarter of a block's time, so blocks that ran before are reckoned by
        what they took then.
        """
        known, rows = self._trainer.row_bytes, self._work.num_rows
        longest = max(self._work.lengths).bit_length()  # attention may hold its scores
        kind = (block, longest, block in self._parts)
        with torch.enable_grad():
            if kind in known:
                yield
            else:
                count = HeldCount(self._trainer.weights)
                with torch.autograd.graph.saved_tensors_hooks(count.pack, lambda one: one):
                    yield
                known[kind] = count.num_bytes / rows
        self._graph_bytes += int(known[kind] * rows)

    def _read(self) -> torch.Tensor:
        rows = self._rows_of(self._work.rows)
        if self._work.trained is not None:
            self._parts = parts_of(self._work, self._trainer.facts, self._trainer.device)
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

    def _is_finite(self) -> bool:
        """Whether all gradients are; looked at once, at the end: such values go on and on."""
        found = [one for parts in self._parts.values() for one in parts.gradients]
        rows = [] if self._rows is None else [self._rows]
        return all(map(all_finite, [*rows, *found]))

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
