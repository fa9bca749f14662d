"""Adapters that PEFT made for tiny models, and what transformers with PEFT computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from shoal.base.adapters import AdapterId, AdapterPart
from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.model.adapter_files import read_peft
from shoal.model.lora import targets_of
from shoal.model.parts import Parts
from tests.models import tiny_model

RANK = 4


def save_adapter(
    directory: Path,
    family: str,
    seed: int,
    *,
    targets: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> None:
    """Let PEFT write an adapter with random A and B for all linear layers of all blocks."""
    model = tiny_model(family)
    if targets is None:
        targets = sorted(targets_of(Parts(model).blocks[0]))
    config = LoraConfig(
        **{"r": RANK, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
        | options
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                values = 0.2 * torch.randn(weight.shape, generator=generator)
                weight.copy_(values.to(dtype))
                weight.data = weight.data.to(dtype)
    adapted.save_pretrained(directory)


def peft_model(directory: Path, family: str) -> Any:
    """The tiny model with an adapter, as PEFT runs it."""
    return PeftModel.from_pretrained(tiny_model(family), directory).eval()


class States:
    """What a whole model has before its final norm."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._found = torch.zeros(0)
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        parts = Parts(inner)
        parts.norm.register_forward_pre_hook(self._keep)
        next(iter(parts.blocks)).register_forward_pre_hook(self._keep_first, with_kwargs=True)

    def _keep(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._found = inputs[0][0].float()

    def _keep_first(self, _module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.first = (inputs[0] if inputs else options["hidden_states"])[0].clone()

    @torch.no_grad()
    def of(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(S, D) rows into the first block and out of the last."""
        self._model(input_ids=torch.tensor([tokens]), use_cache=False)
        return self.first, self._found


def read(directory: Path, family: str) -> AdapterPart:
    """The adapter as we read it."""
    return read_peft(directory, tiny_model(family).config)


class Runner:
    """Sequences of one backend over all of its blocks."""

    def __init__(self, backend: BlockBackend) -> None:
        self.backend = backend
        self.lengths: dict[int, int] = {}

    def open(self, sequence: int, adapter: int | None) -> None:
        chosen = None if adapter is None else AdapterId(adapter)
        self.backend.open(SequenceId(sequence), self.backend.facts.span, chosen)
        self.lengths[sequence] = 0

    async def run(self, rows: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """New rows of some sequences in one run; all outputs."""
        hidden = self.backend.facts.hidden_size
        calls = []
        for sequence, values in rows.items():
            calls.append(self.call(sequence, values))
            self.lengths[sequence] += len(values)
        results: dict[int, torch.Tensor] = {}
        for call, outcome in zip(calls, await self.backend.run(calls), strict=True):
            assert isinstance(outcome, bytes), outcome
            values = torch.frombuffer(bytearray(outcome), dtype=torch.float32)
            results[call.sequence] = values.view(-1, hidden)
        return results

    def call(self, sequence: int, values: torch.Tensor, call_count: int | None = None) -> Call:
        return Call(
            sequence=SequenceId(sequence),
            span=self.backend.facts.span,
            position=self.lengths[sequence],
            count=len(values),
            call_count=call_count or len(values),
            payload=values.contiguous().numpy().tobytes(),
            encoding="float32",
            output_encoding="float32",
            rows_wanted=len(values),
        )
