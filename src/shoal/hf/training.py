"""Gradients through blocks at servers: the swarm as one differentiable function of torch.

Servers run blocks forward and back; weights stay as they are. Gradients reach the rows that
went in, and what is trained inside the blocks (`Tuning`): deep prompts and LoRA matrices,
which belong to the caller and travel with each step.
Shapes: T rows of all sequences, one after the other; D hidden size, P positions of a prompt,
R rank, I inputs, O outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from shoal.base.adapters import AdapterConfig, AdapterEncoding, DropoutKey, LoraShape
from shoal.base.errors import BadInput
from shoal.base.spans import Span
from shoal.base.training import BlockTensors, TrainedSpec, TrainedTensors
from shoal.client.training_batch import Batch, Trail
from shoal.model.rows import DTYPES, all_finite, rows_from_bytes, rows_to_bytes, tensor_bytes

if TYPE_CHECKING:
    from shoal.hf.model import DistributedModelForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What is trained inside blocks. Its tensors may want gradients; any may be absent."""

    prompts: torch.Tensor | None = None
    """(blocks of the model, P, D): added to the first P rows of every sequence where they enter
    each block (deep prompts; P-tuning v2, arXiv 2110.07602)."""
    lora: Mapping[int, Mapping[str, tuple[torch.Tensor, torch.Tensor]]] = field(
        default_factory=dict
    )
    """By block and by a layer's path inside it: A (R, I) and B (O, R)."""
    config: AdapterConfig | None = None
    """Of the LoRA matrices: their scale and dropout."""
    encoding: AdapterEncoding = "bfloat16"
    """How the tensors travel: their values are rounded to it. Gradients come in float32."""
    seed: int | None = 0
    """Of dropout, drawn where gradients are wanted; None: no dropout."""
    step: int = 0
    """Of training: every step drops other values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is asked of servers in one call, without its tensors."""

    model: DistributedModelForCausalLM
    span: Span
    lengths: tuple[int, ...]
    encoding: str
    spec: TrainedSpec | None
    key: DropoutKey | None


def run_blocks(
    model: DistributedModelForCausalLM,
    rows: torch.Tensor,
    lengths: Sequence[int],
    span: Span,
    tuning: Tuning | None = None,
) -> torch.Tensor:
    """(T, D) rows behind the blocks of `span`. Differentiable.

    Args:
        model: whose blocks.
        rows: (T, D) of whole sequences from position 0, one after the other, unpadded.
        lengths: positions of each sequence.
        span: which blocks.
        tuning: what is trained inside them.

    Raises:
        BadInput: shapes that don't fit, values that are not finite.
        AdapterBad: LoRA matrices that don't fit the layers.
        NoRouteError, PeerError: the swarm could not do it.
    """
    task, leaves, wants = task_of(model, rows, lengths, span, tuning)
    if not wants:
        return _forward(task, rows, leaves, is_kept=False)[0]
    result: torch.Tensor = _RemoteBlocks.apply(task, rows, *leaves)  # type: ignore[no-untyped-call]
    return result


def task_of(
    model: DistributedModelForCausalLM,
    rows: torch.Tensor,
    lengths: Sequence[int],
    span: Span,
    tuning: Tuning | None,
) -> tuple[Task, list[torch.Tensor], bool]:
    """What is asked of servers, the tensors that go with it, and whether gradients are wanted.

    Raises:
        BadInput: shapes that don't fit, values that are not finite.
    """
    size = model.head.hidden_size
    if rows.dim() != 2 or rows.shape != (sum(lengths), size) or not lengths or min(lengths) < 1:
        raise BadInput(
            f"rows of shape {tuple(rows.shape)} for {len(lengths)} sequences: give "
            f"({sum(lengths)}, {size})"
        )
    if not all_finite(rows):
        raise BadInput("hidden states hold values that are not finite: lower the learning rate?")
    spec, leaves = _spec_of(tuning, span, size, model.num_blocks, lengths)
    wants = torch.is_grad_enabled() and any(one.requires_grad for one in (rows, *leaves))
    key = None
    if wants and tuning is not None and tuning.seed is not None and _drops(tuning):
        key = DropoutKey(seed=tuning.seed, step=tuning.step)
    task = Task(
        model=model,
        span=span,
        lengths=tuple(lengths),
        encoding=model.training_encoding,
        spec=spec,
        key=key,
    )
    return task, leaves, wants


def batch_of(task: Task, rows: torch.Tensor, leaves: Sequence[torch.Tensor]) -> Batch:
    """The same as bytes.

    Raises:
        SessionClosed: the model was closed.
    """
    task.model.connection.check_open()
    trained = None
    if task.spec is not None:
        dtype = DTYPES[task.spec.encoding]
        parts = [tensor_bytes(leaf.detach().to("cpu", dtype)) for leaf in leaves]
        trained = TrainedTensors(spec=task.spec, values=b"".join(parts))
    return Batch(
        span=task.span,
        lengths=task.lengths,
        rows=rows_to_bytes(rows.detach(), task.encoding),
        encoding=task.encoding,
        trained=trained,
        key=task.key,
    )


class _RemoteBlocks(torch.autograd.Function):
    """Blocks at servers, as one step of a graph."""

    @staticmethod
    def forward(ctx: Any, task: Task, rows: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        output, trail = _forward(task, rows, leaves, is_kept=True)
        ctx.task, ctx.trail = task, trail
        ctx.like = (rows.dtype, rows.device)
        ctx.leaves = [Like.of(leaf) for leaf in leaves]
        # A graph that is thrown away never comes back for what servers keep.
        weakref.finalize(ctx, _forget, task.model, trail)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        task: Task = ctx.task
        if not all_finite(gradients[0]):
            raise BadInput("gradients hold values that are not finite: lower the learning rate?")
        sums = Sums(task.spec, ctx.leaves)
        values = rows_to_bytes(gradients[0].detach(), task.encoding)
        model = task.model
        found = model.connection.loop.run(
            model.training_client.backward(ctx.trail, values, sums.add)
        )
        dtype, device = ctx.like
        rows = rows_from_bytes(found, task.encoding, sum(task.lengths), model.head.hidden_size)
        return (None, rows.to(dtype=dtype, device=device), *sums.gradients())


@dataclass(frozen=True, slots=True)
class Like:
    """What a gradient must be like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        """That of this tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Sums:
    """Gradients of tensors, added up over micro-batches in float32."""

    def __init__(self, spec: TrainedSpec | None, leaves: Sequence[Like]) -> None:
        self._leaves = leaves
        self._sums = [torch.zeros(leaf.shape, dtype=torch.float32) for leaf in leaves]
        self._places: dict[int, list[int]] = {}
        at = 0
        for block in () if spec is None else spec.blocks:
            count = bool(block.prompt_tokens) + 2 * len(block.lora)
            self._places[block.index] = list(range(at, at + count))
            at += count

    def add(self, block: int, values: bytes) -> None:
        """Those of one micro-batch, of one block's tensors in order."""
        flat = torch.frombuffer(bytearray(values), dtype=torch.float32)
        at = 0
        for place in self._places[block]:
            total = self._sums[place]
            total += flat[at : at + total.numel()].view(total.shape)
            at += total.numel()

    def gradients(self) -> list[torch.Tensor]:
        """All of them, each as its tensor."""
        return [
            total.to(dtype=leaf.dtype, device=leaf.device)
            for total, leaf in zip(self._sums, self._leaves, strict=True)
        ]


def _forward(
    task: Task, rows: torch.Tensor, leaves: Sequence[torch.Tensor], *, is_kept: bool
) -> tuple[torch.Tensor, Trail]:
    model, batch = task.model, batch_of(task, rows, leaves)
    trail = model.connection.loop.run(model.training_client.forward(batch, is_kept=is_kept))
    count, size = sum(task.lengths), model.head.hidden_size
    left = rows_from_bytes(trail.output, task.encoding, count, size)
    return left.to(dtype=rows.dtype, device=rows.device), trail


def _forget(model: DistributedModelForCausalLM, trail: Trail) -> None:
    model.connection.loop.call_soon(lambda: model.training_client.forget(trail))


def _drops(tuning: Tuning) -> bool:
    return tuning.config is not None and tuning.config.dropout > 0


def _spec_of(
    tuning: Tuning | None, span: Span, size: int, num_blocks: int, lengths: Sequence[int]
) -> tuple[TrainedSpec | None, list[torch.Tensor]]:
    """What of `tuning` lies in `span`, and its tensors in the order of their bytes.

    Raises:
        BadInput: shapes that can't be.
    """
    if tuning is None:
        return None, []
    prompt_tokens = _prompt_tokens(tuning, size, num_blocks, lengths)
    if any(tuning.lora.values()) and tuning.config is None:
        raise BadInput("LoRA matrices without a config: give Tuning(config=AdapterConfig(...))")
    blocks: list[BlockTensors] = []
    leaves: list[torch.Tensor] = []
    for index in range(span.start, span.end):
        layers = sorted(tuning.lora.get(index, {}).items())
        if not layers and not prompt_tokens:
            continue
        if tuning.prompts is not None:
            leaves.append(tuning.prompts[index])
        shapes: list[LoraShape] = []
        for target, (a, b) in layers:
            shapes.append(_shape(tuning, index, target, a, b))
            leaves += [a, b]
        blocks.append(BlockTensors(index=index, prompt_tokens=prompt_tokens, lora=tuple(shapes)))
    if not blocks:
        return None, []
    config = tuning.config if any(block.lora for block in blocks) else None
    spec = TrainedSpec(config=config, encoding=tuning.encoding, blocks=tuple(blocks))
    return spec, leaves


def _prompt_tokens(tuning: Tuning, size: int, num_blocks: int, lengths: Sequence[int]) -> int:
    prompts = tuning.prompts
    if prompts is None:
        return 0
    if prompts.dim() != 3 or (prompts.shape[0], prompts.shape[2]) != (num_blocks, size):
        raise BadInput(
            f"deep prompts of shape {tuple(prompts.shape)}: give ({num_blocks}, positions, {size})"
        )
    count = int(prompts.shape[1])
    if not count or min(lengths) < count:
        raise BadInput(
            f"deep prompts of {count} positions and a sequence of {min(lengths)}: put as many rows "
            "in front of every sequence"
        )
    return count


def _shape(tuning: Tuning, block: int, target: str, a: torch.Tensor, b: torch.Tensor) -> LoraShape:
    rank = 0 if tuning.config is None else tuning.config.rank
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise BadInput(
            f"{target} of block {block}: A {tuple(a.shape)} and B {tuple(b.shape)} for rank "
            f"{rank}: A is (rank, inputs), B is (outputs, rank)"
        )
    return LoraShape(target=target, inputs=int(a.shape[1]), outputs=int(b.shape[0]))
