"""The receiving end of a link: which rows it lets in. The pair: test_link_outbound.py."""

import pytest

from shoal.base.ids import PeerId, SessionId
from shoal.link.inbound import Inbound, Verdict
from shoal.wire.messages import WANT_ALL, WANT_LAST, WANT_NONE, Cut, Entry

SESSION = SessionId(b"s" * 16)
BEFORE, STRANGER = PeerId(b"B" * 32), PeerId(b"X" * 32)


def inbound(*, rev=0, have=10, is_final=False):
    made = Inbound(SESSION, 2, is_final=is_final)
    made.reroute(BEFORE, 3)
    made.rev, made.have = rev, have
    return made


def entry(position, count=2, *, epoch=3, rev=0, base_rev=0, cuts=(), want=WANT_ALL, rows=None):
    return Entry(
        session=SESSION, border=2, epoch=epoch, rev=rev, base_rev=base_rev,
        cuts=[Cut(*cut) for cut in cuts], position=position, count=count, call_count=count,
        want=want, encoding="float32", payload_bytes=count if rows is None else rows,
    )  # fmt: skip


def admit(to, header, limit=1 << 20):
    return to.admit(BEFORE, header, bytes(range(header.payload_bytes)), limit)


@pytest.mark.parametrize(
    ("peer", "epoch"), [(STRANGER, 3), (BEFORE, 2), (BEFORE, 4)], ids=["stranger", "old", "new"]
)
def test_only_the_predecessor_of_this_epoch_is_heard(peer, epoch):
    to = inbound()
    assert to.admit(peer, entry(10, epoch=epoch), b"ab").verdict is Verdict.STALE
    assert to.have == 10


@pytest.mark.parametrize(
    ("position", "verdict", "have"),
    [
        (10, Verdict.ACCEPTED, 12),
        (9, Verdict.ACCEPTED, 11),
        (8, Verdict.HELD, 10),
        (0, Verdict.HELD, 10),
        (11, Verdict.GAP, 10),
    ],
)
def test_rows_are_let_in_once_and_in_order(position, verdict, have):
    to = inbound()
    admission = admit(to, entry(position))
    assert (admission.verdict, to.have) == (verdict, have)


def test_of_rows_that_are_partly_held_the_rest_is_taken():
    admission = admit(inbound(), entry(8, 5))
    assert (admission.entry.position, admission.entry.count) == (10, 3)
    assert bytes(admission.entry.data()) == bytes([2, 3, 4])


def test_an_older_revision_is_dropped():
    to = inbound(rev=2)
    assert admit(to, entry(10, rev=1)).verdict is Verdict.OLD
    assert (to.rev, to.have) == (2, 10)


def test_a_newer_revision_cuts_first():
    to = inbound(rev=1)
    header = entry(6, rev=4, base_rev=0, cuts=[(1, 2), (2, 6), (4, 8)])
    admission = admit(to, header)
    assert admission.verdict is Verdict.ACCEPTED
    assert admission.cuts == ((2, 6), (4, 8))
    assert (to.rev, to.have) == (4, 8)


def test_a_revision_that_tells_too_little_leaves_a_gap():
    """We are older than what the sender believes: cuts we need may be missing."""
    to = inbound(rev=1)
    assert admit(to, entry(6, rev=4, base_rev=2, cuts=[(4, 6)])).verdict is Verdict.GAP
    assert (to.rev, to.have) == (1, 10)


def test_a_gap_behind_a_cut_changes_nothing():
    to = inbound(rev=1)
    admission = admit(to, entry(8, rev=2, base_rev=1, cuts=[(2, 5)]))
    assert (admission.verdict, admission.cuts) == (Verdict.GAP, ())
    assert (to.rev, to.have) == (1, 10)


def test_rows_that_are_cut_off_already_are_not_wanted():
    to = inbound()
    admission = admit(to, entry(10, 4), limit=12)
    assert (admission.verdict, admission.entry.count, to.have) == (Verdict.ACCEPTED, 2, 12)
    assert admit(to, entry(12), limit=12).verdict is Verdict.OLD
    assert to.have == 12


@pytest.mark.parametrize(("want", "rows"), [(WANT_ALL, 4), (WANT_LAST, 1), (WANT_NONE, 0)])
def test_the_client_gets_the_rows_that_it_wanted(want, rows):
    admission = admit(inbound(is_final=True), entry(10, 4, want=want, rows=rows))
    assert (admission.entry.count, admission.entry.num_rows) == (4, rows)


def test_what_is_lost_must_come_again():
    to = inbound()
    to.lower(4)
    to.lower(7)
    assert to.have_message(100, 3).length == 4
    assert admit(to, entry(10)).verdict is Verdict.GAP
    assert to.gap_message().length == 4
