"""The page ledger against a plain sum."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import InternalError
from shoal.server.pages import PageLedger

PAGE, TOTAL = 16, 20

operations = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), st.integers(0, 5), st.integers(0, 200)),
        st.tuples(st.just("release"), st.integers(0, 5), st.just(0)),
    )
)


@given(operations)
def test_nobody_gets_more_than_there_is(steps):
    ledger = PageLedger(TOTAL * PAGE + PAGE - 1, PAGE)
    held = {}
    for kind, key, tokens in steps:
        if kind == "release":
            ledger.release(key)
            held.pop(key, None)
            continue
        pages = (tokens + PAGE - 1) // PAGE
        others = sum(held.values()) - held.get(key, 0)
        assert ledger.lacking(key, tokens) == pages + others - TOTAL
        if pages + others <= TOTAL:
            ledger.hold(key, tokens)
            held[key] = pages
        else:
            with pytest.raises(InternalError, match="overdrawn"):
                ledger.hold(key, tokens)
        held = {name: count for name, count in held.items() if count}
        assert ledger.free == TOTAL - sum(held.values())
        assert ledger.holders() == set(held)
        assert all(ledger.held(name) == count for name, count in held.items())


def test_a_begun_page_is_a_page():
    ledger = PageLedger(TOTAL * PAGE, PAGE)
    assert [ledger.pages(tokens) for tokens in (0, 1, PAGE, PAGE + 1)] == [0, 1, 1, 2]
    assert ledger.held("nobody") == 0


def test_the_retired_share_what_they_had_and_others_a_new_budget():
    ledger = PageLedger(TOTAL * PAGE, PAGE)
    ledger.hold("a", 12 * PAGE)
    ledger.hold("b", 8 * PAGE)
    ledger.retire(["a", "b", "parked"], 30 * PAGE)
    assert (ledger.free, ledger.used) == (30, TOTAL)
    assert (ledger.total_for("a"), ledger.total_for("new")) == (TOTAL, 30)
    ledger.hold("new", 30 * PAGE)
    assert ledger.lacking("a", 13 * PAGE) == 1
    ledger.release("b")
    assert ledger.lacking("parked", 8 * PAGE) == 0
    assert ledger.lacking("another", PAGE) == 1
    ledger.assign("fork", is_retired=True)
    ledger.hold("fork", 8 * PAGE)
    with pytest.raises(InternalError, match="20 pages of the old cache"):
        ledger.end_retirement()
    with pytest.raises(InternalError, match="one move at a time"):
        ledger.retire([], PAGE)
    for key in ("a", "fork"):
        ledger.release(key)
    ledger.end_retirement()
    assert (ledger.free, ledger.used) == (0, 30)
    assert not ledger.is_retired("a")
