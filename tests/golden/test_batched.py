"""The batched engine computes what the per-session engine computes, family by family."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span
from shoal.model.families import family_of
from shoal.model.memory_source import MemorySource
from shoal.model.torch_backend import BackendConfig, load_backend
from tests.models import FAMILIES, tiny_config, tiny_source

PACKED = tuple(family for family in FAMILIES if family_of(tiny_config(family)).packs)
TOLERANCE = 1e-5
"""Largest difference relative to the largest value, float32."""

# Prefill, chunked prefill, decode and small calls of five sequences, mixed in every run.
SCHEDULE = [
    (14, 5, 1, 0, 2),
    (1, 12, 1, 9, 3),
    (1, 1, 1, 1, 1),
    (1, 1, 25, 1, 0),
    (7, 1, 1, 1, 1),
    *[(1, 1, 1, 1, 1)] * 6,
]


@cache
def source(family: str) -> MemorySource:
    return tiny_source(family)


def loaded(family: str, engine: str, exact: str = "never", dtype: str = "float32") -> BlockBackend:
    blocks = tiny_config(family).num_hidden_layers
    config = BackendConfig(model="m", dtype=dtype, engine=engine, exact=exact)
    return load_backend(source(family), Span(0, blocks), config)


def spans_of(backend: BlockBackend) -> list[Span]:
    """Whole spans, and parts that begin and end in the middle."""
    end = backend.facts.span.end
    middle = max(end // 2, 1)
    return [Span(0, end), Span(0, middle), Span(middle - 1, end), Span(0, end), Span(end - 1, end)]


def outputs(backend: BlockBackend, *, is_mixed: bool) -> list[list[torch.Tensor]]:
    """Each sequence's outputs, run by run; mixed in one run, or call by call."""
    hidden = backend.facts.hidden_size
    rng = torch.Generator().manual_seed(5)
    spans = spans_of(backend)
    lengths = [0] * len(spans)
    results: list[list[torch.Tensor]] = [[] for _ in spans]
    for index, span in enumerate(spans):
        backend.open(SequenceId(index), span)
    for counts in SCHEDULE:
        calls = []
        for index, count in enumerate(counts):
            rows = torch.randn(max(count, 1), hidden, generator=rng)
            if count:
                calls.append(call_of(index, spans[index], lengths[index], rows))
                lengths[index] += count
        groups: Sequence[Sequence[Call]] = [calls] if is_mixed else [[call] for call in calls]
        for group in groups:
            for call, outcome in zip(group, asyncio.run(backend.run(group)), strict=True):
                assert isinstance(outcome, bytes), outcome
                values = torch.frombuffer(bytearray(outcome), dtype=torch.float32)
                results[call.sequence].append(values.view(-1, hidden))
    asyncio.run(backend.aclose())
    return results


def call_of(index: int, span: Span, position: int, rows: torch.Tensor) -> Call:
    count = rows.shape[0]
    return Call(
        sequence=SequenceId(index),
        span=span,
        position=position,
        count=count,
        call_count=count,
        payload=rows.numpy().tobytes(),
        encoding="float32",
        output_encoding="float32",
        rows_wanted=count,
    )


@cache
def expected(family: str) -> list[list[torch.Tensor]]:
    return outputs(loaded(family, "per-session"), is_mixed=False)


@pytest.mark.parametrize("exact", ["never", "always"])
@pytest.mark.parametrize("family", PACKED)
def test_mixed_runs_give_what_one_by_one_gives(family: str, exact: str) -> None:
    ours = outputs(loaded(family, "batched", exact), is_mixed=True)
    for mine, theirs in zip(
        itertools.chain(*ours), itertools.chain(*expected(family)), strict=True
    ):
        assert (mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_forks_and_cuts_in_company_give_what_fresh_sequences_give(family: str) -> None:
    rng = random.Random(2)
    backend = loaded(family, "batched", "always")
    span, hidden = backend.facts.span, backend.facts.hidden_size
    rows = torch.randn(60, hidden, generator=torch.Generator().manual_seed(1))
    first, child, other = SequenceId(0), SequenceId(1), SequenceId(2)
    for sequence in (first, other):
        backend.open(sequence, span)

    def run(*work: tuple[SequenceId, int, int]) -> list[bytes]:
        calls = [call_of(s, span, start, rows[start:end]) for s, start, end in work]
        outcomes = asyncio.run(backend.run(calls))
        assert all(isinstance(outcome, bytes) for outcome in outcomes)
        return [outcome for outcome in outcomes if isinstance(outcome, bytes)]

    run((first, 0, 30), (other, 0, 30))
    kept = rng.randint(5, 25)
    assert backend.fork(first, child, kept) == kept
    run((first, 30, 31), (child, kept, kept + 9))
    assert backend.truncate(other, kept) == kept
    again = run((other, kept, kept + 9), (first, 31, 32))[0]
    backend.truncate(child, kept)
    assert run((child, kept, kept + 9))[0] == again
    asyncio.run(backend.aclose())
