"""Exact mode with adapters: a row's bits don't depend on company, and a replay repeats them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from shoal.base.adapters import AdapterConfig, AdapterId, AdapterPart
from shoal.base.spans import Span
from shoal.model.adapter_tensors import adapter_of
from shoal.model.lora import LoraPair, targets_of
from shoal.model.parts import Parts
from shoal.model.quantize import Quantization
from shoal.model.torch_backend import BackendConfig, load_backend
from tests.golden.adapter_cases import Runner
from tests.models import tiny_model, tiny_source

PROMPT, DECODED = 13, 9
BLOCKS = 4


def random_adapter(family: str, seed: int, rank: int) -> AdapterPart:
    """For all linear layers of all blocks."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        index: {
            target: LoraPair(
                0.2 * torch.randn(rank, inputs, generator=generator),
                0.2 * torch.randn(outputs, rank, generator=generator),
            )
            for target, (inputs, outputs) in targets_of(block).items()
        }
        for index, block in enumerate(Parts(tiny_model(family)).blocks)
    }
    targets = tuple(sorted({target for layers in pairs.values() for target in layers}))
    config = AdapterConfig(rank=rank, alpha=3.0, targets=targets, use_rslora=rank == 3)
    return adapter_of(config, "float32", pairs)


async def alone(runner: Runner, sequence: int, adapter: int | None, rows: torch.Tensor) -> None:
    """A prompt, then single rows."""
    runner.open(sequence, adapter)
    await runner.run({sequence: rows[:PROMPT]})


async def outputs_of(
    runner: Runner, sequences: Sequence[int], rows: torch.Tensor, start: int, end: int
) -> list[list[torch.Tensor]]:
    """Single rows of sequences that run together: the outputs of each."""
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for at in range(start, end):
        outputs = await runner.run(dict.fromkeys(sequences, rows[at : at + 1]))
        for one, sequence in zip(found, sequences, strict=True):
            one.append(outputs[sequence][0])
    return found


async def check_company(dtype: str, quantize: Quantization, family: str) -> None:
    config = BackendConfig(
        model="m", dtype=dtype, engine="batched", exact="always", quantize=quantize
    )
    backend = load_backend(tiny_source(family), Span(0, BLOCKS), config)
    assert backend.facts.is_exact
    for number, rank in ((1, 4), (2, 3), (3, 8)):
        await backend.load_adapter(AdapterId(number), random_adapter(family, number, rank))
    runner = Runner(backend)
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(PROMPT + DECODED, backend.facts.hidden_size, generator=generator)
    end = PROMPT + DECODED
    await alone(runner, 0, 1, rows)
    (expected,) = await outputs_of(runner, [0], rows, PROMPT, end)
    # The same beside others of its adapter, of other ones, and of none.
    company = [1, 2, 3, None, 1, 2, None, 1, 3, 1, 1, 2]
    for sequence, adapter in enumerate(company, 10):
        await alone(runner, sequence, adapter, rows)
    together = await outputs_of(runner, range(10, 10 + len(company)), rows, PROMPT, end)
    plain = together[company.index(None)]
    for adapter, found in zip(company, together, strict=True):
        if adapter == 1:
            assert all(map(torch.equal, found, expected))
        assert adapter is None or not torch.equal(found[0], plain[0])
        assert all(map(torch.equal, found, together[company.index(adapter)]))
    # A replay: many single rows of one sequence in one run.
    await alone(runner, 99, 1, rows)
    calls = []
    for at in range(PROMPT, end):
        calls.append(runner.call(99, rows[at : at + 1]))
        runner.lengths[99] += 1
    for outcome, right in zip(await backend.run(calls), expected, strict=True):
        assert isinstance(outcome, bytes)
        assert torch.equal(torch.frombuffer(bytearray(outcome), dtype=torch.float32), right)
    # A chunk that is cut short, in the shape that it had first.
    runner.open(98, 2)
    (whole,) = (await runner.run({98: rows})).values()
    runner.open(97, 2)
    cut = runner.call(97, rows[:11], call_count=len(rows))
    (outcome,) = await backend.run([cut])
    assert isinstance(outcome, bytes)
    found = torch.frombuffer(bytearray(outcome), dtype=torch.float32).view(11, -1)
    assert torch.equal(found, whole[:11])
    await backend.aclose()


@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [
        ("float32", "none"),
        ("bfloat16", "none"),
        ("bfloat16", "int8"),
        ("bfloat16", "int4"),
    ],
)
def test_bits_do_not_depend_on_company(dtype: str, quantize: Quantization) -> None:
    asyncio.run(check_company(dtype, quantize, "llama" if quantize == "none" else "wide"))
