"""A session's state at its owner: what is sent, received, cut, copied, and suspected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import BadInput, SessionClosed
from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import ENTRY_TOKENS_MAX, STALL_MIN_S
from shoal.base.spans import Span
from shoal.client.chain_session import choose_chunk
from shoal.client.session import Recovery, SessionState, Trouble, split_chunks
from shoal.plan.view import Stage
from shoal.wire.messages import WANT_ALL, WANT_LAST, WANT_NONE, Ack, Cut, Entry, Gap, Stale

ME, A, B, C = (PeerId(name * 32) for name in (b"m", b"a", b"b", b"c"))
ROW = 4  # one float32 value
CHAIN = (
    Stage(peer=A, span=Span(0, 2)), Stage(peer=B, span=Span(2, 4)), Stage(peer=C, span=Span(4, 6))
)  # fmt: skip
RELAYED = (CHAIN[0], Stage(peer=ME, span=Span(2, 2)), CHAIN[1], CHAIN[2])


def make_state(chain=CHAIN):
    state = SessionState(SessionId(b"s" * 16), Span(0, 6), "float32", 1)
    state.follow(chain, 1, ME)
    return state


def receive(state, position, count, *, rev=None, want=WANT_ALL, peer=C, border=6, cuts=()):
    """Rows come back; each is its position, as bytes."""
    kept = {WANT_ALL: count, WANT_LAST: 1, WANT_NONE: 0}[want]
    end = position + count
    data = b"".join(row(number) for number in range(end - kept, end))
    rev = state.log.rev if rev is None else rev
    header = Entry(
        state.id, border, state.epoch, rev, 0, [Cut(*cut) for cut in cuts], position, count,
        count, want, "float32", len(data),
    )  # fmt: skip
    return state.on_entry(peer, header, data)


def row(number):
    return number.to_bytes(ROW, "big")


# --- chunks ------------------------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 80))
def test_chunks_add_up_and_the_last_one_answers(start, count, size):
    chunks = split_chunks(start, count, size, WANT_LAST)
    assert sum(number for number, _ in chunks) == count
    assert all(1 <= number <= size for number, _ in chunks)
    assert [want for _, want in chunks] == [WANT_NONE] * (len(chunks) - 1) + [WANT_LAST]
    assert {want for _, want in split_chunks(start, count, size, WANT_ALL)} == {WANT_ALL}


# --- rows out ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size"),
    [(0, 0), (ENTRY_TOKENS_MAX + 1, ENTRY_TOKENS_MAX + 1), (2, 1), (1, 2)],
    ids=["none", "too many", "too few bytes", "too many bytes"],
)
def test_rows_of_a_wrong_size_are_refused(count, size):
    state = make_state()
    with pytest.raises(BadInput):
        state.append(bytes(size * ROW), count, WANT_ALL)
    assert state.length == 0


@pytest.mark.parametrize("length", [-1, 6])
def test_only_what_there_is_can_be_cut(length):
    state = make_state()
    state.append(bytes(5 * ROW), 5, WANT_ALL)
    with pytest.raises(BadInput, match="can't truncate"):
        state.truncate(length)


def test_a_truncation_forgets_rows_that_were_not_taken():
    state = make_state()
    state.append(bytes(5 * ROW), 5, WANT_ALL)
    receive(state, 0, 5)
    state.truncate(3)
    assert (state.length, state.received_length, state.log.rev) == (3, 3, 1)
    assert state.take_rows(0, 3) == row(0) + row(1) + row(2)
    state.truncate(3)
    assert state.log.rev == 1


# --- rows in -----------------------------------------------------------------------------


def test_rows_are_taken_once():
    state = make_state()
    state.append(bytes(9 * ROW), 9, WANT_ALL)
    assert isinstance(receive(state, 1, 2), Gap)
    assert isinstance(receive(state, 0, 4), Ack)
    assert receive(state, 2, 4).length == 6
    assert state.is_waiting
    assert state.take_rows(1, 5) == b"".join(map(row, range(1, 5)))
    receive(state, 6, 3, want=WANT_LAST)
    assert not state.is_waiting
    assert state.take_rows(6, 9) == row(8)


def test_rows_that_are_cut_off_meanwhile_are_not_taken():
    """Those before the cut still count."""
    state = make_state()
    state.append(bytes(6 * ROW), 6, WANT_ALL)
    state.truncate(4)
    state.append(bytes(ROW), 1, WANT_ALL)
    receive(state, 0, 6, rev=0)
    assert state.received_length == 4
    assert state.take_rows(0, 5) == b"".join(map(row, range(4)))
    receive(state, 4, 1, cuts=[(1, 4)])
    assert state.received_length == 5


@pytest.mark.parametrize(
    ("peer", "rev"), [(B, 0), (C, 7)], ids=["not the last server", "a revision of the future"]
)
def test_rows_that_nobody_may_send(peer, rev):
    state = make_state()
    state.append(bytes(ROW), 1, WANT_ALL)
    assert isinstance(receive(state, 0, 1, peer=peer, rev=rev), Stale)
    assert state.received_length == 0


def test_a_relay_passes_rows_on_and_is_dropped_when_it_is_not_needed():
    state = make_state(RELAYED)
    (relay,) = state.relays.values()
    assert isinstance(receive(state, 0, 3, peer=A, border=2), Ack)
    assert relay.log.end == 3
    assert set(state.outbounds()) == {state.outbound, relay.outbound}
    assert state.follow(RELAYED, 2, ME) == []
    assert state.follow(CHAIN, 3, ME) == [relay.outbound]
    assert state.outbounds() == [state.outbound]


# --- who is to blame ---------------------------------------------------------------------


def test_which_server_is_before_which():
    """A relay of ours is passed over: who made the rows counts."""
    state = make_state(RELAYED)
    assert state.predecessor(A, 0) is None
    assert state.predecessor(B, 2) == A
    assert state.predecessor(C, 4) == B
    assert state.predecessor(C, 2) is None
    assert state.servers == {A, B, C}


@pytest.mark.parametrize(
    ("held", "received", "suspect"),
    [
        ((9, 9, 9), 9, None),
        ((9, 5, 5), 5, A),
        ((9, 9, 5), 5, B),
        ((9, 9, 9), 5, C),
        ((5, 9, 9), 9, None),
    ],
)
def test_the_suspect_is_where_rows_stop(held, received, suspect):
    state = make_state()
    state.held = {(stage.peer, stage.span.start): n for stage, n in zip(CHAIN, held, strict=True)}
    state.inbound.have = received
    assert state.suspect() == suspect


def test_reports_add_up_until_they_are_taken():
    state = make_state()
    state.report(Trouble(lost={A}), 5.0)
    state.report(Trouble(links={(A, B)}, is_out_of_step=True), 9.0)
    assert state.stirred.is_set()
    trouble = state.take_trouble()
    assert (trouble.lost, trouble.links, trouble.is_out_of_step) == ({A}, {(A, B)}, True)
    assert trouble.since_s == 5.0
    assert not state.trouble


def test_a_row_ends_what_was_wrong():
    state = make_state()
    state.standstills, state.stuck_since_s, state.backoff_s = 3, 1.0, 2.0
    state.resync_after_s = 16.0
    state.recovering_since_s = 4.0
    state.pending_recovery = Recovery(
        position=7, lost=(A,), replacement=(B,), replayed_tokens=7, pause_s=0.5
    )
    state.advanced(10.0)
    assert (state.standstills, state.stuck_since_s, state.backoff_s) == (0, None, 0.0)
    assert state.resync_after_s == STALL_MIN_S
    assert [one.pause_s for one in state.recoveries] == [6.0]
    state.advanced(11.0)
    assert len(state.recoveries) == 1


# --- ends and copies -----------------------------------------------------------------------


def test_the_first_failure_is_the_one_that_is_told():
    state = make_state()
    state.append(bytes(ROW), 1, WANT_ALL)
    state.check_open()
    state.fail(SessionClosed("first"))
    state.fail(BadInput("second"))
    assert not state.is_waiting
    assert state.changed.is_set()
    with pytest.raises(SessionClosed, match="first"):
        state.check_open()


def test_a_fork_begins_with_what_its_parent_sent_and_received():
    parent = make_state(RELAYED)
    parent.append(bytes(8 * ROW), 8, WANT_ALL)
    receive(parent, 0, 5, peer=A, border=2)
    receive(parent, 0, 4)
    child = SessionState(SessionId(b"f" * 16), Span(0, 6), "float32", 1)
    child.start_as_fork(parent, parent.log.rev, 6)
    assert (child.length, child.received_length, child.log.rev) == (6, 4, 0)
    assert child.relays[2].inbound.have == child.relays[2].log.end == 5
    assert child.chain == RELAYED
    child.truncate(2)
    assert (parent.length, parent.received_length) == (8, 4)


@pytest.mark.parametrize(
    ("count", "chunk"), [(1, 96), (512, 96), (1024, 128), (1500, 160), (2048, 256), (9000, 256)]
)
def test_chunks_depend_on_the_prompts_length_alone(count, chunk):
    assert choose_chunk(count) == chunk
