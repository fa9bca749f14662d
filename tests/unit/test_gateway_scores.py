"""Options on scores, and draws from many tokens."""

from __future__ import annotations

import pytest
import torch

from shoal.base.errors import BadInput, ConfigError
from shoal.hf import sampling
from shoal.hf.sampling import Sampler
from shoal.hf.score_rules import ScoreOptions, ScoreRules, chances, masked

SCORES = torch.tensor([2.0, -1.0, 0.5, 0.0])


def applied(options: ScoreOptions, answer: list[int]) -> list[float]:
    rules = ScoreRules(options, [3, 1], 4)
    for token in answer:
        rules.add(token)
    before = SCORES.clone()
    found: list[float] = rules.apply(SCORES).tolist()
    assert torch.equal(SCORES, before)
    return found


@pytest.mark.parametrize(
    ("options", "answer", "expected"),
    [
        (ScoreOptions(), [0, 0], [2.0, -1.0, 0.5, 0.0]),
        (ScoreOptions(repetition=2.0), [0], [1.0, -2.0, 0.5, 0.0]),
        (ScoreOptions(presence=0.5), [0, 0, 2], [1.5, -1.0, 0.0, 0.0]),
        (ScoreOptions(frequency=0.5), [0, 0, 2], [1.0, -1.0, 0.0, 0.0]),
        (ScoreOptions(bias={1: 5.0, 0: -100.0}), [], [-98.0, 4.0, 0.5, 0.0]),
    ],
)
def test_options_change_scores(options, answer, expected) -> None:
    assert applied(options, answer) == pytest.approx(expected)


@pytest.mark.parametrize("answer", [[], [0, 0, 2, 1, 0]])
def test_an_answer_so_far_is_counted_at_once(answer: list[int], monkeypatch) -> None:
    options = ScoreOptions(repetition=1.5, presence=0.25, frequency=0.5)
    one_by_one = applied(options, answer)
    monkeypatch.delattr(ScoreRules, "add")
    assert ScoreRules(options, [3, 1], 4, answer).apply(SCORES).tolist() == one_by_one


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(BadInput, match="token 4"):
        ScoreRules(ScoreOptions(bias={4: 1.0}), [], 4)


def test_masked_tokens_and_those_without_a_bit_are_impossible() -> None:
    scores = torch.arange(10.0)
    found = masked(scores, bytes([0b10100000]))
    assert [token for token in range(10) if torch.isfinite(found[token])] == [5, 7]
    assert float(found[7]) == 7.0


def test_chances_are_the_models_own() -> None:
    found = chances(torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3])), 0, 2)
    assert found.chosen == pytest.approx(-2.302585)
    assert [token for token, _ in found.best] == [1, 3]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_p": 0.9},
        {"top_k": 5},
        {"top_k": 5000},
        {"min_p": 0.02},
        {"top_k": 300, "top_p": 0.8, "min_p": 0.001},
        {"temperature": 3.0},
        {"temperature": 3.0, "top_p": 0.99},
    ],
)
def test_sorting_a_part_draws_as_sorting_all(options, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(9000, generator=generator) * 3
    scores[::7] = 1.0  # ties
    sampler = Sampler(**{"temperature": 1.0, "seed": 4} | options)
    found = [sampler.choose(scores, position) for position in range(100)]
    monkeypatch.setattr(sampling, "_BEST_TOKENS", ())
    assert [sampler.choose(scores, position) for position in range(100)] == found


@pytest.mark.parametrize("temperature", [1e-320, 1.0])
@pytest.mark.parametrize("options", [{}, {"min_p": 0.1}, {"top_k": 300}, {"top_p": 0.5}])
def test_more_tokens_than_are_sorted_are_the_best(temperature: float, options) -> None:
    scores = torch.randn(9000, generator=torch.Generator().manual_seed(5))
    scores[1000:6000] = 1e9  # a bias that swallows every difference
    sampler = Sampler(temperature=temperature, seed=4, **options)
    assert {1000 <= sampler.choose(scores, position) < 6000 for position in range(9)} == {True}


def test_infinite_scores_are_refused() -> None:
    for scores in (torch.tensor([1.0, torch.inf]), torch.full((3,), -torch.inf)):
        with pytest.raises(BadInput, match="infinite"):
            Sampler(temperature=1.0).choose(scores, 0)


def test_min_p_keeps_what_is_likely_enough() -> None:
    sampler = Sampler(temperature=1.0, min_p=0.6)
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    assert {sampler.choose(logits, position) for position in range(300)} == {1, 3}
    with pytest.raises(ConfigError, match="min_p"):
        Sampler(min_p=1.5)


def test_few_possible_tokens_among_many() -> None:
    scores = torch.full((3000,), -torch.inf)
    scores[[17, 2900]] = 0.0
    sampler = Sampler(temperature=1.0, top_p=0.9)
    assert {sampler.choose(scores, position) for position in range(50)} == {17, 2900}
