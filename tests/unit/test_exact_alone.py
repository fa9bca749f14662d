"""Exact mode without batching: calls repeated in their first shape give the same bits.

Every kind of model that the batched engine doesn't take, and one that it does.
"""

from __future__ import annotations

import asyncio
from functools import cache

import pytest
import torch

from shoal.base.backend import Call, SequenceId
from shoal.base.spans import Span
from shoal.model.batched_backend import BatchedBackend
from shoal.model.torch_backend import BackendConfig, ExactChoice, TorchBackend, load_backend
from tests.models import tiny_source

FAMILIES = ["llama", "bloom", "falcon", "falcon_new", "falcon_alibi", "mamba2", "qwen3_next"]
DTYPES = ["float32", "bfloat16"]
SPAN = Span(0, 4)
SUBJECT, OTHER, FRESH = SequenceId(1), SequenceId(2), SequenceId(3)
Shapes = list[tuple[int, int]]
"""Rows of each call, and how many it had at first."""

WHOLE: Shapes = [(19, 19), (1, 1), (1, 1), (7, 7), (40, 40), (1, 1), (1, 1)]


@cache
def backend(family: str, dtype: str, copy: int = 0, exact: ExactChoice = "always") -> TorchBackend:
    config = BackendConfig(model="m", dtype=dtype, engine="per-session", exact=exact)
    span = SPAN if copy < 2 else Span(1, 4)
    loaded = load_backend(tiny_source(family), span, config)
    assert isinstance(loaded, TorchBackend)
    return loaded


def call_of(
    target: TorchBackend, sequence: SequenceId, position: int, shape: tuple[int, int], seed: int
) -> Call:
    rows = [
        torch.randn(
            target.facts.hidden_size, generator=torch.Generator().manual_seed(seed * 1000 + index)
        )
        for index in range(position, position + shape[0])
    ]
    return Call(
        sequence=sequence,
        span=target.facts.span,
        position=position,
        count=shape[0],
        call_count=shape[1],
        payload=torch.stack(rows).numpy().tobytes(),
        encoding="float32",
        output_encoding=target.facts.encodings[0],
        rows_wanted=shape[0],
    )


def play(
    target: TorchBackend,
    shapes: Shapes,
    *,
    in_company: bool = False,
    sequence: SequenceId = SUBJECT,
    start: int = 0,
) -> list[bytes]:
    """The outputs of each call, from `start` on; the sequence stays open."""
    if not start:
        target.close(sequence)
        target.open(sequence, target.facts.span)
    outputs: list[bytes] = []
    other = 0
    target.open(OTHER, target.facts.span)
    for shape in shapes:
        calls = [call_of(target, sequence, start, shape, seed=1)]
        if in_company:
            calls.insert(0, call_of(target, OTHER, other, (5, 5), seed=2))
            other += 5
        outcome = asyncio.run(target.run(calls))[-1]
        assert isinstance(outcome, bytes), outcome
        outputs.append(outcome)
        start += shape[0]
    target.close(OTHER)
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_company_and_replay_elsewhere_change_no_bit(family: str, dtype: str) -> None:
    target = backend(family, dtype)
    assert target.facts.is_exact
    alone = play(target, WHOLE)
    assert play(target, WHOLE, in_company=True) == alone
    assert play(backend(family, dtype, copy=1), WHOLE, in_company=True) == alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", [6, 33])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_call_has_the_bits_it_had_and_goes_on_alike_everywhere(
    family: str, kept: int, dtype: str
) -> None:
    """Cut back, then repeated at once or elsewhere: the rows that stay, and those that follow."""
    target, fresh = backend(family, dtype), backend(family, dtype, copy=1)
    before: Shapes = [(5, 5), (1, 1)]
    first = play(target, [*before, (40, 40)])
    length = 6 + kept
    left = target.truncate(SUBJECT, length)
    cut: Shapes = [*before, (kept, 40)]
    after: Shapes = [(1, 1), (12, 12), (1, 1)]
    if left < length:
        assert left == 0
        play(target, cut)
    followed = play(target, after, start=length)
    replayed = play(fresh, [*cut, *after])
    row_bytes = len(first[2]) // 40
    assert replayed[2] == first[2][: kept * row_bytes]
    assert replayed[3:] == followed


@pytest.mark.parametrize("family", ["bloom", "qwen3_next"])
def test_a_fork_goes_on_like_its_parent(family: str) -> None:
    target = backend(family, "bfloat16")
    play(target, WHOLE)
    length = sum(count for count, _ in WHOLE)
    target.close(FRESH)
    assert target.fork(SUBJECT, FRESH, length) == length
    after: Shapes = [(1, 1), (9, 9)]
    assert play(target, after, start=length, sequence=FRESH) == play(target, after, start=length)


@pytest.mark.parametrize("family", ["bloom", "mamba2"])
def test_without_experts_it_costs_nothing_and_is_the_default(family: str) -> None:
    auto = backend(family, "float32", exact="auto")
    assert auto.facts.is_exact
    assert auto.facts.numerics == backend(family, "float32").facts.numerics
    assert auto.facts.numerics == backend(family, "float32", copy=2).facts.numerics
    never = backend(family, "float32", exact="never")
    assert not never.facts.is_exact
    assert never.facts.numerics != auto.facts.numerics


def test_the_engines_have_classes_of_their_own() -> None:
    config = BackendConfig(model="m", engine="batched", exact="always")
    batched = load_backend(tiny_source("llama"), SPAN, config)
    assert isinstance(batched, BatchedBackend)
    assert batched.facts.numerics != backend("llama", "float32").facts.numerics
