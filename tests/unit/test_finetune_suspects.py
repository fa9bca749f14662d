"""Which steps hold what a liar gave before it was caught."""

from __future__ import annotations

from collections import Counter

from shoal.base.ids import PeerId
from shoal.cli.finetune_suspects import Suspects

LIAR, OTHER = PeerId(bytes(32)), PeerId(bytes([7]) * 32)


def test_steps_with_unchecked_values_of_who_is_caught() -> None:
    suspects, taken = Suspects(0), Counter({OTHER: 3})
    assert suspects.stepped(1, taken, ()) == []
    taken[LIAR] += 2
    assert suspects.stepped(2, taken, ()) == []
    assert suspects.stepped(3, taken, ()) == []
    taken[LIAR] += 1
    (text,) = suspects.stepped(4, taken, (LIAR,))
    assert "in step 4 and is not used any more" in text
    assert "is in steps 2 to 4: to be rid of it go on from a step before 2 (--resume" in text
    assert suspects.stepped(5, taken, (LIAR,)) == []


def test_who_was_caught_at_once_and_who_was_there_from_the_beginning() -> None:
    (text,) = Suspects(6).stepped(7, Counter(), (LIAR,))
    assert "all that it gave since step 7 was checked" in text
    (text,) = Suspects(0).stepped(1, Counter({LIAR: 1}), (LIAR,))
    assert "what it gave unchecked is in step 1: to be rid of it begin anew" in text
