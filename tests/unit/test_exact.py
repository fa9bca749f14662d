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
from tests.unit.exact_cases import CONFIGS, MIXTURES, SPAN, Step, backend, play, source

DTYPES = ["float32", "bfloat16"]
QUICK = ("deepseek_v3",)
"""Of the mixtures, what the fast tests run: with latent attention, and a float32 router."""
DENSE_AND_QUICK = [name for name in CONFIGS if name not in MIXTURES or name in QUICK]
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in MIXTURES and name not in QUICK))
    for name in CONFIGS
]
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
@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_found_and_announced(name: str, dtype: str) -> None:
    chosen = backend(name, dtype)
    assert chosen.facts.is_exact
    assert chosen.tiles is not None
    packed = backend(name, dtype, exact="never")
    assert not packed.facts.is_exact
    assert packed.facts.numerics != chosen.facts.numerics
    assert chosen.facts.numerics.startswith(f"{dtype}-")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DENSE_AND_QUICK)
def test_decode_in_any_company_has_the_same_bits(name: str, dtype: str) -> None:
    target = backend(name, dtype)
    steps = steps_of([24, *[1] * 24])
    alone = play(target, steps)
    for others in (1, 11, 40):
        assert_same(alone, play(target, steps, company=random.Random(others), others=others))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] in MIXTURES])
def test_mixed_shapes_alone_in_company_and_replayed(name: str, dtype: str) -> None:
    target, fresh = backend(name, dtype), backend(name, dtype, copy=1)
    steps = steps_of([24, 1, 1, 1, 33, 1, 1, 9, 3])
    alone = play(target, steps)
    assert_same(alone, play(target, steps, company=random.Random(1), others=9))
    assert_same(alone, play(fresh, steps, company=random.Random(2), at_once=32))


@settings(max_examples=8, deadline=None)
@given(counts=script, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "mistral-sliding",
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", marks=pytest.mark.slow),
    ],
)
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
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_cut_call_is_repeated_in_its_first_shape(
    name: str, dtype: str, kept: int, whole: int
) -> None:
    """With experts, the zeros in place of the missing rows choose others than these did."""
    target, fresh = backend(name, dtype), backend(name, dtype, copy=1)
    _, long = play(target, steps_of([11, whole]))
    _, short = play(fresh, [Step(11, 11), Step(kept, whole)])
    for mine, theirs in zip(short, long, strict=True):
        assert torch.equal(mine, theirs[:, :, : 11 + kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_small_calls_are_free_of_their_shape(name: str, dtype: str) -> None:
    target = backend(name, dtype)
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


def test_experts_are_exact_on_request_only() -> None:
    chosen = backend("qwen3_moe", "bfloat16", exact="auto")
    assert not chosen.facts.is_exact
    assert chosen._model.experts.tiles is None
    assert backend("qwen3_moe", "bfloat16").facts.is_exact


def test_transformers_own_experts_would_not_do() -> None:
    """What the tiles are for: without them, company changes bits."""
    target = backend("qwen3_moe", "float32", copy=7)
    steps = steps_of([24, *[1] * 12])
    target._model.experts.reset()
    alone = play(target, steps)
    runs = [play(target, steps, company=random.Random(n), others=20) for n in range(3)]
    if all(torch.equal(a, b) for run in runs for a, b in zip(alone[1], run[1], strict=True)):
        pytest.skip("this processor sums in one order whatever the number of rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiled_experts_compute_what_transformers_own_do(dtype: str) -> None:
    for name in MIXTURES:
        steps = steps_of([24, 1, 9])
        ours, _ = play(backend(name, dtype), steps)
        theirs, _ = play(backend(name, dtype, exact="never"), steps)
        mine, other = (
            torch.frombuffer(bytearray(rows), dtype=getattr(torch, dtype)).float()
            for rows in (ours, theirs)
        )
        tolerance = 1e-5 if dtype == "float32" else 0.05
        assert (mine - other).abs().max() <= tolerance * other.abs().max(), name


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
