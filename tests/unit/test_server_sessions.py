"""Who gives way when the cache is full, and what opening a session costs."""

import asyncio
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import InternalError, PeerBusy, SessionTooLong
from shoal.base.ids import PeerId, SessionId
from shoal.base.spans import Span
from shoal.lab.toy_backend import ToyBackend, ToyConfig
from shoal.lab.toy_blocks import toy_embedding
from shoal.server.quotas import SESSIONS_PER_CLIENT, Quotas
from shoal.server.session import HopPlan
from shoal.server.sessions import IDLE_VICTIM_S, SessionTable
from shoal.server.switching import SwitchingBackend
from shoal.wire.messages import WANT_ALL, Entry, Fork

PAGE, TOTAL = 16, 12
NOW_S = 1000.0


def make_table(*, pages=TOTAL, quotas=None):
    quotas = quotas or Quotas(cache_share=1.0)
    config = ToyConfig(span=Span(0, 4), num_blocks=4, cache_tokens=pages * PAGE, page_tokens=PAGE)
    return SessionTable(ToyBackend(config), window_bytes=1 << 20, quotas=quotas)


def make_plan(number, *, opened_ms=0, owner=b"o", span=(0, 4)):
    peer = PeerId(owner * 32)
    return HopPlan(
        session=SessionId(number.to_bytes(16, "big")), owner=peer, opened_ms=opened_ms, epoch=1,
        span=Span(*span), predecessor=peer, successor=peer, is_last=True, encoding="float32",
    )  # fmt: skip


def admit(hop, position, count):
    """`count` rows wait at the hop."""
    rows = b"".join(toy_embedding(position + i) for i in range(count))
    header = Entry(
        hop.plan.session, 0, 1, 0, 0, [], position, count, count, WANT_ALL, "float32", len(rows)
    )
    hop.admit(hop.plan.predecessor, header, rows)


# --- make_room ---------------------------------------------------------------------------

neighbours = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([1.0, 60.0]), st.integers(1, 3), st.booleans()),
    max_size=6,
)


def populate(table, neighbours):
    """One hop for each (opened_ms, idle for seconds, pages, has work)."""
    for number, (opened_ms, idle_s, pages, has_work) in enumerate(neighbours, 1):
        if table.ledger.free < pages:
            break
        hop = table.open(make_plan(number, opened_ms=opened_ms), None, NOW_S - idle_s)
        table.ledger.hold(hop.sequence, pages * PAGE)
        if has_work:
            admit(hop, 0, 1)


def is_idle(hop):
    return not hop.has_work and NOW_S - hop.used_s > IDLE_VICTIM_S


def rank(hop):
    """Who goes first: the idle, then the youngest."""
    return (0, 0) if is_idle(hop) else (1, -hop.plan.opened_ms)


@given(neighbours, st.integers(0, 9), st.integers(1, TOTAL), st.sets(st.integers(1, 6)))
def test_victims_are_idle_first_then_the_youngest_and_never_older(others, opened, pages, kept):
    table = make_table()
    populate(table, others)
    everybody = list(table)
    keep = [hop.key for hop in everybody if hop.plan.session[-1] in kept]
    if not table.ledger.free:
        return
    asker = table.open(make_plan(99, opened_ms=opened), None, NOW_S)
    held = {hop.key: table.ledger.held(hop.sequence) for hop in everybody}
    may = [
        hop for hop in everybody
        if hop.key not in keep and (is_idle(hop) or hop.seniority > asker.seniority)
    ]  # fmt: skip
    ranks = {hop.key: rank(hop) for hop in may}  # before they are parked
    free = table.ledger.free + 1
    victims = table.make_room(asker, pages * PAGE, NOW_S, keep)
    if free + sum(held[hop.key] for hop in may) < pages:
        assert victims is None
        assert not any(hop.is_parked for hop in everybody)
        return
    assert [ranks[hop.key] for hop in victims] == sorted(ranks.values())[: len(victims)]
    freed = sum(held[hop.key] for hop in victims)
    assert free + freed >= pages
    assert not victims or free + freed - held[victims[-1].key] < pages, "one victim too many"
    assert all(hop.is_parked == (hop in victims) for hop in everybody)
    check_pages(table)


def check_pages(table):
    held = {hop.sequence: table.ledger.held(hop.sequence) for hop in table}
    assert sum(held.values()) + table.ledger.free == table.ledger.total
    assert table.ledger.holders() == {sequence for sequence, pages in held.items() if pages}
    for hop in table:
        hop.check_integrity()
        assert not (hop.is_parked and held[hop.sequence])


def test_what_never_fits_is_refused_at_once():
    table = make_table()
    hop = table.open(make_plan(1), None, NOW_S)
    with pytest.raises(SessionTooLong, match="--cache-tokens"):
        table.make_room(hop, TOTAL * PAGE + 1, NOW_S)
    assert table.make_room(hop, TOTAL * PAGE, NOW_S) == []


def test_a_parked_hop_returns_only_when_it_has_work():
    table = make_table()
    old = table.open(make_plan(1, opened_ms=1), None, NOW_S)
    idle = table.open(make_plan(2, opened_ms=2), None, NOW_S)
    busy = table.open(make_plan(3, opened_ms=3), None, NOW_S)
    admit(busy, 0, 5)
    assert set(table.make_room(old, TOTAL * PAGE, NOW_S)) == {idle, busy}
    assert table.returning() == [busy]
    assert (busy.parked_length, busy.inbound.have) == (5, 0)
    idle.wants_return = True
    assert table.returning() == [idle, busy]


# --- open and close -----------------------------------------------------------------------


def test_a_full_table_of_older_sessions_is_busy():
    table = make_table(pages=2)
    for number in (1, 2):
        table.open(make_plan(number, opened_ms=number), None, NOW_S)
    with pytest.raises(PeerBusy) as caught:
        table.open(make_plan(3, opened_ms=3), None, NOW_S)
    assert caught.value.retry_after_s
    assert len(table) == 2
    hop = table.open(make_plan(4, opened_ms=0), None, NOW_S)
    assert [other.plan.opened_ms for other in table if other.is_parked] == [2]
    assert table.ledger.held(hop.sequence) == 1
    check_pages(table)


def test_one_owner_cannot_take_all_places():
    table = make_table(pages=SESSIONS_PER_CLIENT + 2)
    for number in range(SESSIONS_PER_CLIENT):
        table.open(make_plan(number), None, NOW_S)
    with pytest.raises(PeerBusy, match="you have"):
        table.open(make_plan(5000), None, NOW_S)
    table.open(make_plan(5000, owner=b"p"), None, NOW_S)


def test_closing_frees_pages_now_and_the_cache_before_the_next_iteration():
    table = make_table()
    hop = table.open(make_plan(1), None, NOW_S)
    table.close(hop)
    assert table.find(hop.key) is None
    assert table.sending(hop.plan.session, 4) is None
    assert table.ledger.free == TOTAL
    table.settle()
    table.close(hop)
    assert table.settle() == []


def test_a_backend_that_opens_nothing_costs_no_page():
    table = make_table()
    with pytest.raises(InternalError):
        table.open(make_plan(1, span=(0, 5)), None, NOW_S)
    assert table.ledger.free == TOTAL
    assert len(table) == 0


@pytest.mark.parametrize(
    ("parent", "owner", "span", "held"),
    [
        (Fork(make_plan(1).session, 0, 0), b"o", (0, 4), 0),
        (Fork(make_plan(2).session, 0, 8), b"o", (0, 4), 0),
        (Fork(make_plan(1).session, 1, 8), b"o", (0, 4), 0),
        (Fork(make_plan(1).session, 0, 8), b"x", (0, 4), 0),
        (Fork(make_plan(1).session, 0, 8), b"o", (0, 3), 0),
    ],
    ids=["nothing", "unknown", "later revision", "somebody else's", "other blocks"],
)
def test_what_cannot_be_forked_starts_empty(parent, owner, span, held):
    table = make_table()
    table.open(make_plan(1), None, NOW_S)
    child = table.open(make_plan(7, owner=owner, span=span), parent, NOW_S)
    assert child.inbound.have == held
    check_pages(table)


# --- shares and the line ------------------------------------------------------------------


def test_a_free_page_goes_to_who_waits_in_line_for_it():
    table = make_table(pages=2)
    hops = [table.open(make_plan(number, opened_ms=number), None, NOW_S) for number in (1, 2)]
    with pytest.raises(PeerBusy, match="place 1 in line"):
        table.open(make_plan(3, opened_ms=3), None, NOW_S)
    table.close(hops[0])
    with pytest.raises(PeerBusy, match="place 2 in line"):
        table.open(make_plan(4, opened_ms=4), None, NOW_S)
    table.open(make_plan(3, opened_ms=3), None, NOW_S)
    assert table.line.ahead_of(make_plan(4).session, NOW_S) == 0
    check_pages(table)


def test_an_owner_holds_no_more_than_its_share_however_old_it_says_its_sessions_are():
    table = make_table(pages=8, quotas=Quotas(cache_share=0.75))
    old = table.open(make_plan(2, opened_ms=0, owner=b"p"), None, NOW_S)
    young = table.open(make_plan(3, opened_ms=1, owner=b"p"), None, NOW_S)
    assert table.make_room(old, 3 * PAGE, NOW_S) == []
    assert table.make_room(young, 3 * PAGE, NOW_S) == []
    assert table.make_room(young, 4 * PAGE, NOW_S) is None
    assert table.is_capped(young, 4 * PAGE)
    assert table.make_room(table.open(make_plan(1, opened_ms=9), None, NOW_S), PAGE, NOW_S) == []
    assert table.make_room(old, 4 * PAGE, NOW_S) == [young]
    check_pages(table)


def test_a_session_larger_than_its_owners_share_is_too_long():
    table = make_table(pages=8, quotas=Quotas(cache_share=0.75))
    hop = table.open(make_plan(1), None, NOW_S)
    with pytest.raises(SessionTooLong, match="--cache-share"):
        table.make_room(hop, 7 * PAGE, NOW_S)
    with pytest.raises(SessionTooLong, match="--cache-tokens"):
        table.make_room(hop, 9 * PAGE, NOW_S)


def test_two_owners_that_fill_the_cache_do_not_wait_for_each_other():
    table = make_table(pages=8, quotas=Quotas(cache_share=0.75))
    old = table.open(make_plan(1, opened_ms=1), None, NOW_S)
    young = table.open(make_plan(2, opened_ms=2, owner=b"p"), None, NOW_S)
    table.make_room(old, 5 * PAGE, NOW_S)
    table.make_room(young, 3 * PAGE, NOW_S)
    assert table.make_room(young, 4 * PAGE, NOW_S) is None
    assert table.make_room(old, 6 * PAGE, NOW_S) == [young]


# --- a move to other blocks --------------------------------------------------------------


def moving_table():
    """A full old cache over [0,4), and a new one over [2,6)."""
    old = ToyConfig(span=Span(0, 4), num_blocks=6, cache_tokens=TOTAL * PAGE, page_tokens=PAGE)
    backend = SwitchingBackend(ToyBackend(old))
    table = SessionTable(backend, window_bytes=1 << 20, quotas=Quotas(cache_share=1.0))
    for number in (1, 2):
        hop = table.open(make_plan(number, opened_ms=number), None, NOW_S)
        table.make_room(hop, TOTAL // 2 * PAGE, NOW_S)
    backend.add(ToyBackend(dataclasses.replace(old, span=Span(2, 6))))
    table.retire_all()
    return table, backend


def test_the_old_pages_dont_count_for_the_new_blocks():
    table, backend = moving_table()
    assert table.ledger.free == TOTAL
    new = table.open(make_plan(3, opened_ms=0, span=(2, 6)), None, NOW_S)
    assert table.make_room(new, TOTAL * PAGE, NOW_S) == []
    assert [hop.plan.session[-1] for hop in table.retired] == [1, 2]
    assert all(table.runs(hop.plan.session, Span(0, 4)) for hop in table.retired)
    assert not table.runs(new.plan.session, Span(0, 4))
    assert backend.is_old_used


def test_room_in_one_cache_is_never_made_by_victims_of_the_other():
    table, _ = moving_table()
    older, younger = table.retired
    new = table.open(make_plan(3, opened_ms=9, span=(2, 6)), None, NOW_S)
    assert table.make_room(older, TOTAL * PAGE, NOW_S) == [younger]
    assert not new.is_parked
    # Blocks that both have belong to the new ones from now on, others stay with the old.
    both = table.open(make_plan(4, opened_ms=9, span=(2, 4)), None, NOW_S)
    assert both not in table.retired
    with pytest.raises(PeerBusy):
        table.open(make_plan(5, opened_ms=9, span=(0, 2)), None, NOW_S)


def test_a_fork_lives_where_its_parent_does():
    table, backend = moving_table()
    parent = table.retired[0]
    table.ledger.hold(table.retired[1].sequence, PAGE)
    admit(parent, 0, 3)
    calls = parent.next_calls(1)
    (output,) = asyncio.run(backend.run(calls))
    parent.commit(output)
    child = table.open(make_plan(7, opened_ms=9), Fork(parent.plan.session, 0, 2), NOW_S)
    assert child.cache_length == 2
    assert child in table.retired
    for hop in list(table):
        table.close(hop)
    table.settle()
    assert not backend.is_old_used
    table.ledger.end_retirement()
    asyncio.run(backend.drop_old())
