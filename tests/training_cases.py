"""What training passes must give: the whole model of transformers with hooks, in one graph."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from shoal.base.adapters import AdapterConfig, LoraShape
from shoal.base.spans import Span
from shoal.base.training import (
    BlockTensors,
    BlockTrainer,
    Draw,
    PassGradients,
    PassWork,
    TrainedSpec,
    TrainedTensors,
)
from shoal.model.lora import targets_of
from shoal.model.parts import Parts
from shoal.model.rows import DTYPES, rows_from_bytes, tensor_bytes

RANK = 3


@dataclass(frozen=True)
class Tensors:
    """Trained tensors as torch sees them: by block, in the order of their bytes."""

    spec: TrainedSpec
    blocks: Mapping[int, tuple[torch.Tensor, ...]]

    def within(self, span: Span) -> TrainedTensors:
        spec = self.spec.within(span)
        flat = [t.detach() for block in spec.blocks for t in self.blocks[block.index]]
        dtype = DTYPES[spec.encoding]
        values = b"".join(bytes(tensor_bytes(t.to(dtype))) for t in flat)
        return TrainedTensors(spec=spec, values=values)


def make_tensors(
    whole: Any,
    blocks: Sequence[int],
    targets: Sequence[str] | None = None,
    prompt_tokens: int = 2,
    dropout: float = 0.0,
) -> Tensors:
    """Seeded tensors for blocks of a whole model; targets: default up to three of each block."""
    generator = torch.Generator().manual_seed(5)
    size = int(whole.config.hidden_size)
    specs: list[BlockTensors] = []
    made: dict[int, tuple[torch.Tensor, ...]] = {}
    names: set[str] = set()
    for index in blocks:
        known = targets_of(Parts(whole).blocks[index])
        chosen = sorted(known)[:3] if targets is None else [t for t in targets if t in known]
        shapes = tuple(LoraShape(target=t, inputs=known[t][0], outputs=known[t][1]) for t in chosen)
        names |= set(chosen)
        sizes = [(prompt_tokens, size)] if prompt_tokens else []
        for one in shapes:
            sizes += [(RANK, one.inputs), (one.outputs, RANK)]
        made[index] = tuple(
            (torch.randn(shape, generator=generator) * 0.3).requires_grad_() for shape in sizes
        )
        specs.append(BlockTensors(index=index, prompt_tokens=prompt_tokens, lora=shapes))
    config = AdapterConfig(rank=RANK, alpha=4.0, targets=tuple(sorted(names)), dropout=dropout)
    spec = TrainedSpec(config=config if names else None, encoding="float32", blocks=tuple(specs))
    return Tensors(spec=spec, blocks=made)


def whole_forward(
    whole: Any, rows: torch.Tensor, lengths: Sequence[int], tensors: Tensors | None = None
) -> torch.Tensor:
    """(T, D) before the final norm, by transformers, sequence by sequence; differentiable."""
    parts = Parts(whole)
    kept: list[torch.Tensor] = []
    with ExitStack() as stack:
        hook = parts.norm.register_forward_pre_hook(lambda _m, args: kept.append(args[0][0]))
        stack.callback(hook.remove)
        for block in () if tensors is None else tensors.spec.blocks:
            assert tensors is not None
            _attach(parts.blocks[block.index], block, tensors, stack)
        embedding = parts.embedding
        for sequence in torch.split(rows, list(lengths)):
            # The model adds what its family adds to embeddings; blocks' inputs have it already.
            with _bare(parts, embedding):
                parts.core(inputs_embeds=sequence.unsqueeze(0), use_cache=False)
    return torch.cat(kept)


class _bare:
    """Without learned positions, embedding norms and factors: those are the client's."""

    def __init__(self, parts: Parts, embedding: Any) -> None:
        self._parts = parts
        self._saved: dict[str, Any] = {}

    def __enter__(self) -> None:
        family, core = self._parts.family, self._parts.core
        for name in (family.embedding_norm, family.positions, family.embedding_multiplier):
            if name:
                self._saved[name] = getattr(core, name)
        if family.embedding_norm:
            setattr(core, family.embedding_norm, torch.nn.Identity())
        if family.positions:
            setattr(core, family.positions, _Zeros())
        if family.embedding_multiplier:
            setattr(core, family.embedding_multiplier, 1.0)

    def __exit__(self, *exc: object) -> None:
        for name, value in self._saved.items():
            setattr(self._parts.core, name, value)


class _Zeros(torch.nn.Module):
    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.zeros(())


def _attach(module: Any, block: BlockTensors, tensors: Tensors, stack: ExitStack) -> None:
    mine = list(tensors.blocks[block.index])
    if block.prompt_tokens:
        prompt = mine.pop(0)

        def add(_m: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            padded = functional.pad(prompt, (0, 0, 0, hidden.shape[1] - prompt.shape[0]))
            if args:
                return (hidden + padded, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden + padded}

        stack.callback(module.register_forward_pre_hook(add, with_kwargs=True).remove)
    config = tensors.spec.config
    for one in block.lora:
        a, b = mine.pop(0), mine.pop(0)
        assert config is not None

        def adapt(
            _m: Any,
            args: tuple[Any, ...],
            out: Any,
            a: Any = a,
            b: Any = b,
            s: float = config.scale,
        ) -> Any:
            return out + (args[0] @ a.T @ b.T) * s

        stack.callback(module.get_submodule(one.target).register_forward_hook(adapt).remove)


async def run_pass(
    trainer: BlockTrainer, work: PassWork, gradients: bytes | None, held_bytes_max: int = 1 << 30
) -> tuple[bytes, PassGradients | None]:
    """One pass, forward and, with gradients, back."""
    one = trainer.begin(work, is_for_backward=gradients is not None, held_bytes_max=held_bytes_max)
    try:
        while one.steps_left:
            await one.step()
        output = one.output()
        if gradients is None:
            return output, None
        one.turn(gradients)
        while one.steps_left:
            await one.step()
        return output, one.gradients()
    finally:
        one.close()


@dataclass(frozen=True)
class Result:
    """What a chain of passes gave."""

    rows: torch.Tensor
    row_gradients: torch.Tensor
    gradients: list[torch.Tensor]
    """Of the trained tensors, in order."""


def run_chain(
    trainers: Sequence[tuple[Span, BlockTrainer]],
    rows: torch.Tensor,
    lengths: Sequence[int],
    gradients: torch.Tensor,
    tensors: Tensors | None = None,
    *,
    encoding: str = "float32",
    held_bytes_max: int = 1 << 30,
    draw: Draw | None = None,
) -> Result:
    """Passes through spans one after the other and back, each stateless as servers are."""

    async def run() -> Result:
        values = bytes(tensor_bytes(rows.detach().to(DTYPES[encoding])))
        works: list[tuple[BlockTrainer, PassWork]] = []
        for span, trainer in trainers:
            work = PassWork(
                span=span,
                lengths=tuple(lengths),
                rows=values,
                encoding=encoding,
                trained=None if tensors is None else tensors.within(span),
                draw=draw,
            )
            works.append((trainer, work))
            values, _ = await run_pass(trainer, work, None)
        output = values
        back = bytes(tensor_bytes(gradients.to(DTYPES[encoding])))
        flat: list[bytes] = []
        for trainer, work in reversed(works):
            _, found = await run_pass(trainer, work, back, held_bytes_max)
            assert found is not None
            back = found.rows
            flat.insert(0, found.tensors)
        return Result(
            rows=rows_from_bytes(output, encoding, rows.shape[0], rows.shape[1]),
            row_gradients=rows_from_bytes(back, encoding, rows.shape[0], rows.shape[1]),
            gradients=_split(b"".join(flat), tensors),
        )

    return asyncio.run(run())


def _split(flat: bytes, tensors: Tensors | None) -> list[torch.Tensor]:
    if tensors is None:
        return []
    values = torch.frombuffer(bytearray(flat), dtype=torch.float32)
    shapes = [t.shape for block in tensors.spec.blocks for t in tensors.blocks[block.index]]
    parts = torch.split(values, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def whole_result(
    whole: Any,
    rows: torch.Tensor,
    lengths: Sequence[int],
    gradients: torch.Tensor,
    tensors: Tensors | None = None,
) -> Result:
    """The truth: one graph over the whole model."""
    leaf = rows.detach().clone().requires_grad_()
    output = whole_forward(whole, leaf, lengths, tensors)
    blocks = () if tensors is None else tensors.spec.blocks
    leaves = [t for block in blocks for t in tensors.blocks[block.index]] if tensors else []
    found = torch.autograd.grad(output, [leaf, *leaves], gradients, allow_unused=True)
    given = [
        torch.zeros_like(leaf_) if g is None else g
        for leaf_, g in zip([leaf, *leaves], found, strict=True)
    ]
    return Result(rows=output.detach(), row_gradients=given[0], gradients=given[1:])


def check_equal(found: Result, truth: Result, rtol: float = 1e-4) -> None:
    """Within `rtol` of the truth, relative to each tensor's largest value."""
    pairs = [(found.rows, truth.rows), (found.row_gradients, truth.row_gradients)]
    pairs += list(zip(found.gradients, truth.gradients, strict=True))
    for mine, theirs in pairs:
        bound = rtol * float(theirs.abs().max()) + 1e-7
        assert torch.isfinite(mine).all()
        assert float((mine.float() - theirs.float()).abs().max()) <= bound


def seeded_rows(whole: Any, lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and gradients of what leaves, (T, D) each."""
    generator = torch.Generator().manual_seed(11)
    shape = (sum(lengths), int(whole.config.hidden_size))
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
