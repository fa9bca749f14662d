"""Which steps hold what a liar gave before it was caught, and what can be gone back to."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.cli.finetune_kept import KEPT_MAX, KeptCheckpoints, superfluous
from shoal.cli.finetune_suspects import Suspects

LIAR, OTHER = PeerId(bytes(32)), PeerId(bytes([7]) * 32)


def test_steps_with_unchecked_values_of_who_is_caught() -> None:
    suspects, taken = Suspects(0, lambda: [1, 2, 4]), Counter({OTHER: 3})
    assert suspects.stepped(1, taken, ()) == []
    taken[LIAR] += 2
    assert suspects.stepped(2, taken, ()) == []
    assert suspects.stepped(3, taken, ()) == []
    taken[LIAR] += 1
    (text,) = suspects.stepped(4, taken, (LIAR,))
    assert "in step 4 and is not used any more" in text
    assert "is in steps 2 to 4: to be rid of it go on from step 1 (--resume DIR " in text
    assert suspects.stepped(5, taken, (LIAR,)) == []


def test_who_was_caught_at_once_and_who_was_there_from_the_beginning() -> None:
    (text,) = Suspects(6, lambda: [6]).stepped(7, Counter(), (LIAR,))
    assert "all that it gave since step 7 was checked" in text
    for first, kept in ((1, [1]), (3, [20])):
        suspects = Suspects(0, lambda kept=kept: kept)  # type: ignore[misc]
        (text,) = suspects.stepped(first, Counter({LIAR: 1}), (LIAR,))
        assert f"is in step {first}: to be rid of it begin anew, no checkpoint" in text


def test_what_is_computed_between_steps_is_in_none() -> None:
    suspects = Suspects(0, lambda: [2])
    assert suspects.between("in the evaluation after step 0", Counter({LIAR: 2}), ()) == []
    assert suspects.stepped(1, Counter({LIAR: 2, OTHER: 1}), ()) == []
    (text,) = suspects.between("in the evaluation after step 1", Counter({LIAR: 5}), (LIAR,))
    assert "in the evaluation after step 1 and is not used" in text
    assert "all that it gave since step 1 was checked" in text
    texts = suspects.disputed((LIAR, OTHER))
    assert "if it is wrong, all that it gave" in texts[0]
    assert "if it is wrong, what it gave unchecked is in step 1: " in texts[1]


def test_few_checkpoints_are_kept_the_older_the_fewer(tmp_path: Path) -> None:
    kept = KeptCheckpoints(tmp_path)
    assert kept.steps() == []
    for step in range(20, 4001, 20):
        kept.keep(step, lambda path: path.touch())
        assert len(kept.steps()) == min(KEPT_MAX, step // 20)
    steps = kept.steps()
    assert (steps[0], steps[-1]) == (20, 4000)
    assert steps[-2] >= 3940
    gaps = [later - step for step, later in pairwise(steps)]
    assert all(gap <= 3 * (4000 - step) / 4 + 20 for gap, step in zip(gaps, steps, strict=False))
    (tmp_path / "checkpoints" / "step-x.safetensors").touch()
    kept.keep(steps[4] + 1, lambda path: path.touch())  # the run went on from there
    assert kept.steps() == [*steps[:5], steps[4] + 1]


@given(st.sets(st.integers(0, 10_000), min_size=2), st.integers(2, 9))
def test_no_more_are_kept_than_wanted(steps: set[int], most: int) -> None:
    rising = sorted(steps)
    left = set(rising) - set(superfluous(rising, most))
    assert len(left) == min(most, len(rising))
    assert {rising[0], rising[-1]} <= left


def test_a_folder_that_can_t_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ConfigError, match="can't write to"):
        KeptCheckpoints(tmp_path).keep(1, lambda path: path.touch())
