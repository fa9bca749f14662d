"""Exact mode: a sequence's bits depend on its own calls, not on company or on repairs."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.model.exact import RowTiles, choose_class
from shoal.model.torch_backend import BackendConfig, load_backend
from tests.unit.exact_cases import CONFIGS, SPAN, Step, backend, play, source

DTYPES = ["float32", "bfloat16"]
Result = tuple[bytes, list[torch.Tensor]]

script = st.lists(
    st.one_of(st.just(1), st.sampled_from([1, 2, 8, 9, 16, 33, 40]), st.integers(1, 70)),
    min_size=1,
    max_size=12,
)


def steps_of(counts: Sequence[int]) -> list[Step]:
    return [Step(count, count) for count in counts]


def assert_same(one: Result, other: Result) -> None:
    assert one[0] == other[0]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_tiles_are_found_and_announced(name: str, dtype: str) -> None:
    chosen = backend(name, dtype)
    assert chosen.facts.is_exact
    assert chosen.tiles is not None
    packed = backend(name, dtype, exact="never")
    assert not packed.facts.is_exact
    assert packed.facts.numerics != chosen.facts.numerics
    assert chosen.facts.numerics.startswith(f"{dtype}-")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_in_any_company_has_the_same_bits(name: str, dtype: str) -> None:
    target = backend(name, dtype)
    steps = steps_of([24, *[1] * 24])
    alone = play(target, steps)
    for others in (1, 11, 40):
        assert_same(alone, play(target, steps, company=random.Random(others), others=others))


@settings(max_examples=8, deadline=None)
@given(counts=script, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "mistral-sliding"])
def test_alone_in_company_and_replayed_elsewhere_are_equal(
    name: str, dtype: str, counts: list[int], seeds: tuple[int, int]
) -> None:
    target, fresh = backend(name, dtype), backend(name, dtype, copy=1)
    steps = steps_of(counts)
    alone = play(target, steps)
    for seed in seeds:
        assert_same(alone, play(target, steps, company=random.Random(seed)))
    assert_same(alone, play(fresh, steps, company=random.Random(seeds[0] + 1), others=6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kept", "whole"), [(1, 8), (5, 8), (1, 30), (8, 30), (9, 30), (20, 30), (29, 30)]
)
def test_a_cut_call_is_repeated_in_its_first_shape(dtype: str, kept: int, whole: int) -> None:
    target, fresh = backend("llama", dtype), backend("llama", dtype, copy=1)
    _, long = play(target, steps_of([11, whole]))
    _, short = play(fresh, [Step(11, 11), Step(kept, whole)])
    for mine, theirs in zip(short, long, strict=True):
        assert torch.equal(mine, theirs[:, :, : 11 + kept])


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_calls_are_free_of_their_shape(dtype: str) -> None:
    target = backend("llama", dtype)
    assert_same(play(target, steps_of([30, 1, 1, 1, 1, 1, 1])), play(target, steps_of([30, 4, 2])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_replay_in_one_run_has_the_same_bits(dtype: str) -> None:
    target, fresh = backend("mistral-sliding", dtype), backend("mistral-sliding", dtype, copy=1)
    steps = steps_of([24, *[1] * 20, 33, *[1] * 7, 12, 3])
    alone = play(target, steps)
    assert_same(alone, play(fresh, steps, at_once=32))
    assert_same(alone, play(fresh, steps, at_once=5, company=random.Random(3)))


def test_auto_is_exact_where_it_costs_nothing() -> None:
    for dtype in DTYPES:
        config = BackendConfig(model="m", dtype=dtype, engine="batched")
        chosen = load_backend(source("llama"), SPAN, config)
        tiles = backend("llama", dtype).tiles
        assert tiles is not None
        assert chosen.facts.is_exact == tiles.is_free


@pytest.mark.parametrize(
    ("classes", "best"),
    [
        ([[32, 16, 8, 4, 2, 1]], (1, 2, 4, 8, 16, 32)),
        ([[1], [2, 3], [4, 8, 32]], (4, 8, 32)),
        ([[1], [2, 8, 12], [16, 32]], (2, 8, 12)),
        ([[1], [2, 4]], ()),
        ([], ()),
    ],
)
def test_the_class_with_the_least_padding_is_chosen(
    classes: list[list[int]], best: tuple[int, ...]
) -> None:
    assert choose_class(classes) == best


def test_rows_are_padded_to_the_next_tile() -> None:
    tiles = RowTiles(counts=(4, 8, 32), probe="")
    assert [tiles.padded(count) for count in (1, 4, 5, 9, 32)] == [4, 4, 8, 32, 32]
    assert not tiles.is_free
    with pytest.raises(ValueError, match="33 rows"):
        tiles.padded(33)
