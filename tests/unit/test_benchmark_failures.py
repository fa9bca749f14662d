"""The computed side of the failure benchmarks: seeded generations, and pauses with nobody there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEP_S = 0.01
TOKENS = 200


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def model(load: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    found = load("failures_model")
    monkeypatch.setattr(found, "RUNS", 8)
    return found


def test_a_loss_costs_what_its_line_says(model: Any) -> None:
    run = [STEP_S] * TOKENS
    lost_at = [40, 100, 160]
    for at in lost_at:
        run[at] += 0.1 + 0.001 * at
    parts = model.Parts.of_run(run, lost_at, aftermath=1)
    assert parts.loss_line == (pytest.approx(0.1), pytest.approx(0.001))
    assert parts.step_s == tuple([STEP_S] * TOKENS)
    assert parts.loss_s(0) == pytest.approx(0.1)


def test_few_losses_give_their_mean_and_aftermaths_count(model: Any) -> None:
    run = [STEP_S] * TOKENS
    run[50] += 0.2
    run[52] += 0.1
    parts = model.Parts.of_run(run, [50], aftermath=4, base=[STEP_S] * TOKENS)
    assert parts.loss_line == (pytest.approx(0.3), 0.0)


def test_everyone_meets_the_same_failures(model: Any) -> None:
    parts = model.Parts.of([STEP_S] * TOKENS)
    keeps = model.Method(name="keeps", parts=parts)
    restarts = model.Method(name="restarts", parts=parts, restarts=True)
    free = 1 / STEP_S
    assert model.mean_steps_per_s(keeps, TOKENS, 0.0, 1) == pytest.approx(free)
    assert model.mean_steps_per_s(restarts, TOKENS, 0.0, 1) == pytest.approx(free)
    assert model.mean_steps_per_s(keeps, TOKENS, 0.01, 1) == pytest.approx(free)
    slow = model.mean_steps_per_s(restarts, TOKENS, 0.02, 1)
    assert slow == model.mean_steps_per_s(restarts, TOKENS, 0.02, 1) < free / 2
    assert model.mean_steps_per_s(restarts, TOKENS, 0.2, 1) == "not in 1 h"


def test_without_a_cache_a_failure_repeats_the_step(model: Any) -> None:
    parts = model.Parts.of_whole([(10, 1.0), (20, 2.0)], prompt=10, steps=10)
    assert parts.step_s[0] == pytest.approx(1.1)
    assert parts.step_s[-1] == pytest.approx(2.0)
    assert parts.loss_s(4) == parts.step_s[4]


@pytest.mark.parametrize(
    ("start_s", "end_s", "is_covered"),
    [(0.0, 3.9, True), (0.0, 4.5, False), (4.5, 4.6, False), (5.0, 9.0, True)],
)
def test_blocks_are_covered_while_one_server_is_there(
    load: Any, start_s: float, end_s: float, is_covered: bool
) -> None:
    losses = load("soak_chaos").Losses(away=[(1.0, 5.0, "a"), (4.0, 6.0, "b"), (0.0, 9.0, "c")])
    assert losses.is_covered(["a", "b"], start_s, end_s) == is_covered
