"""Spans with quantised weights against the same model in float32, and against themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from shoal.base.backend import Call, SequenceId
from shoal.base.spans import Span
from shoal.model.quantize import Quantization
from shoal.model.quantized_rows import INT8_BLOCK
from shoal.model.rows import rows_from_bytes, rows_to_bytes
from shoal.model.span_model import load_span
from shoal.model.torch_backend import BackendConfig, load_backend
from tests.quantized_cases import rms_error, wide_source

ERROR_MAX = {"int8": 0.01, "int4": 0.1}
"""Relative rms error behind four random blocks."""

KINDS: tuple[Quantization, ...] = ("int8", "int4")
SPAN = Span(0, 4)


def inputs(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, 128, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def through(
    borders: Sequence[int], kind: Quantization, steps: Sequence[torch.Tensor],
    encoding: str = "float32",
) -> torch.Tensor:  # fmt: skip
    """What a chain with these borders answers to the steps, float32 but for the weights."""
    source = wide_source()
    spans = [Span(start, end) for start, end in pairwise(borders)]
    models = [load_span(source, span, dtype="float32", quantize=kind) for span in spans]
    caches = [model.new_cache(model.span) for model in models]
    answers, position = [], 0
    for rows in steps:
        for index, (model, cache) in enumerate(zip(models, caches, strict=True)):
            if index:
                rows = rows_from_bytes(rows_to_bytes(rows, encoding), encoding, *rows.shape)
            rows = model.forward(rows, position, cache, model.span)
            cache.commit(len(rows))
        answers.append(rows)
        position += len(rows)
    return torch.cat(answers)


STEPS = (inputs(90), *inputs(6, seed=6).split(1))
"""A prefill that takes the way for many rows, then decode."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_span_stays_close_to_float32(kind: Quantization) -> None:
    exact = through((0, 4), "none", STEPS)
    assert rms_error(through((0, 4), kind, STEPS), exact) < ERROR_MAX[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_cutting_the_model_changes_no_bit(kind: Quantization) -> None:
    assert torch.equal(through((0, 1, 4), kind, STEPS), through((0, 4), kind, STEPS))


def test_compressed_links_stay_close_to_raw_ones() -> None:
    exact = through((0, 1, 2, 4), "none", STEPS)
    compressed = through((0, 1, 2, 4), "none", STEPS, INT8_BLOCK)
    assert 0 < rms_error(compressed, exact) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_company_changes_no_bit_where_the_backend_is_exact(kind: Quantization) -> None:
    config = BackendConfig(model="m", dtype="bfloat16", quantize=kind, exact="always")
    backend = load_backend(wide_source(), SPAN, config)

    def call(sequence: int, position: int, count: int) -> Call:
        payload = rows_to_bytes(inputs(count, seed=100 * sequence + position), "bfloat16")
        return Call(
            sequence=SequenceId(sequence), span=SPAN, position=position, count=count,
            call_count=count, payload=payload, encoding="bfloat16", output_encoding="bfloat16",
            rows_wanted=count,
        )  # fmt: skip

    async def decode(sequences: Sequence[int]) -> list[object]:
        """The first sequence's answers."""
        answers: list[object] = []
        for sequence in sequences:
            backend.open(SequenceId(sequence), SPAN)
            answers += (await backend.run([call(sequence, 0, 70)]))[: sequence == sequences[0]]
        for position in range(70, 74):
            outcomes = await backend.run([call(one, position, 1) for one in sequences])
            answers.append(outcomes[0])
        for sequence in sequences:
            backend.close(SequenceId(sequence))
        return answers

    async def both() -> tuple[list[object], list[object]]:
        try:
            return await decode([1]), await decode([1, *range(2, 25)])
        finally:
            await backend.aclose()

    assert backend.facts.numerics.startswith(f"bfloat16+{kind}-")
    assert backend.facts.encodings[-1] == INT8_BLOCK
    alone, in_company = asyncio.run(both())
    assert backend.facts.is_exact
    assert all(isinstance(answer, bytes) for answer in alone)
    assert alone == in_company
