"""Greedy and seeded sampling."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.base.errors import BadInput, ConfigError
from shoal.hf.sampling import Sampler

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))


def frequencies(sampler: Sampler, draws: int = 4000) -> list[float]:
    counts = [0] * 4
    for position in range(draws):
        counts[sampler.choose(LOGITS, position)] += 1
    return [count / draws for count in counts]


def test_temperature_zero_takes_the_best() -> None:
    assert Sampler().choose(LOGITS, 0) == 1
    assert Sampler().choose(torch.tensor([2.0, 5.0, 5.0]), 3) == 1


def test_tokens_come_as_often_as_they_are_likely() -> None:
    found = frequencies(Sampler(temperature=1.0, seed=3))
    assert found == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)


def test_temperature_sharpens() -> None:
    found = frequencies(Sampler(temperature=0.5, seed=3))
    squares = [0.01, 0.16, 0.04, 0.09]
    assert found == pytest.approx([square / 0.3 for square in squares], abs=0.03)


def test_top_k_keeps_the_best() -> None:
    found = frequencies(Sampler(temperature=1.0, top_k=2))
    assert found == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.69, {1, 3}), (0.71, {1, 2, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    found = frequencies(Sampler(temperature=1.0, top_p=top_p))
    assert {token for token, share in enumerate(found) if share} == kept


def test_a_position_draws_the_same_whatever_was_drawn_before() -> None:
    sampler = Sampler(temperature=1.0, seed=11)
    straight = [sampler.choose(LOGITS, position) for position in range(50)]
    replayed = Sampler(temperature=1.0, seed=11)
    assert [replayed.choose(LOGITS, position) for position in range(20, 50)] == straight[20:]
    assert [Sampler(temperature=1.0, seed=12).choose(LOGITS, p) for p in range(50)] != straight


def test_the_draws_of_a_seed_never_change() -> None:
    """Frozen: another outcome breaks everybody's reproducible texts."""
    sampler = Sampler(temperature=1.0, seed=0)
    assert [sampler.choose(LOGITS, position) for position in range(12)] == FROZEN


FROZEN = [1, 3, 3, 1, 2, 0, 1, 2, 0, 3, 3, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 2.0},
    ],
)
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampler(**options)  # type: ignore[arg-type]


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(BadInput):
        Sampler().choose(torch.tensor([1.0, math.nan]), 0)
