"""What a result says about its numbers after a change of the chain."""

import pytest

from shoal.base.ids import SessionId
from shoal.base.spans import Span
from shoal.client.aftermath import judge_numerics
from shoal.client.session import SessionState
from tests.unit.plan_cases import peer, server, stages, swarm

BEFORE = stages((1, 0, 2), (2, 2, 4))
AFTER = stages((1, 0, 2), (3, 2, 4))


@pytest.mark.parametrize(
    ("view", "known", "expected"),
    [
        ((server(1, 0, 2), server(3, 2, 4)), {}, "same-class"),
        ((server(1, 0, 2), server(3, 2, 4, numerics="b")), {}, "crossed"),
        ((server(1, 0, 2),), {peer(3): "a"}, "same-class"),
        ((server(1, 0, 2),), {peer(3): "b"}, "crossed"),
        ((), {peer(3): "a"}, "same-class"),
    ],
    ids=["same", "another", "no record any more", "another, without record", "no records"],
)
def test_numerics_after_a_change(view, known, expected):
    state = SessionState(SessionId(b"s" * 16), Span(0, 4), "float32", 1)
    state.numerics = "exact"
    state.classes = {peer(1): "a", peer(2): "a"} | known
    judge_numerics(state, swarm(4, *view), BEFORE, AFTER)
    assert state.numerics == expected
    if peer(3) in known:  # and later, when it is lost in turn, its class is known
        assert state.classes[peer(3)] == known[peer(3)]
