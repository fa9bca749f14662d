"""Decisions about neighbours, and allowances: tables and properties."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.ids import PeerId
from shoal.base.limits import DIGEST_BUCKETS
from shoal.discovery.allowance import Allowance
from shoal.discovery.digest import RunningDigest, bucket_of
from shoal.discovery.neighbours import (
    DIALS_AT_ONCE,
    MEMBERS_IN_MAX,
    READER_DIALS,
    READERS_IN_MAX,
    SERVER_DIALS,
    NeighbourView,
    Surroundings,
    admits,
    choose_dials,
    choose_surplus,
    prefers_new,
)

PEERS = [PeerId(bytes([number]) * 32) for number in range(100)]


def around(
    dialled: int, accepted: int = 0, *, is_reader: bool = False, dialling: int = 0,
    is_member: bool = True,
) -> Surroundings:  # fmt: skip
    views = [
        NeighbourView(peer=PEERS[i], is_dialled=i < dialled, is_member=is_member, since_s=float(i))
        for i in range(dialled + accepted)
    ]
    return Surroundings(is_reader=is_reader, neighbours=tuple(views), num_dialling=dialling)


@pytest.mark.parametrize(
    ("dialled", "dialling", "is_reader", "expected"),
    [
        (0, 0, False, SERVER_DIALS),
        (0, 0, True, READER_DIALS),
        (2, 0, False, 1),
        (2, 1, False, 0),
        (SERVER_DIALS, 0, False, 0),
        (SERVER_DIALS + 1, 0, False, 0),
        (0, DIALS_AT_ONCE, False, 0),
    ],
)
def test_as_many_are_dialled_as_are_missing(
    dialled: int, dialling: int, is_reader: bool, expected: int
) -> None:
    picture = around(dialled, 5, dialling=dialling, is_reader=is_reader)
    chosen = choose_dials(picture, PEERS[50:], random.Random(1))
    assert len(chosen) == len(set(chosen)) == expected


def test_no_more_are_dialled_than_there_are() -> None:
    assert choose_dials(around(0), PEERS[:1], random.Random(1)) == PEERS[:1]
    assert choose_dials(around(0), [], random.Random(1)) == []


def test_the_longest_known_of_too_many_goes() -> None:
    assert choose_surplus(around(SERVER_DIALS, 9)) is None
    assert choose_surplus(around(SERVER_DIALS + 1, 9)) == PEERS[0]
    assert choose_surplus(around(READER_DIALS + 1, is_reader=True)) == PEERS[0]


@pytest.mark.parametrize(
    ("accepted", "is_member", "expected"),
    [
        (MEMBERS_IN_MAX - 1, True, True),
        (MEMBERS_IN_MAX, True, False),
        (MEMBERS_IN_MAX, False, True),
    ],
)
def test_servers_and_clients_are_counted_apart(
    accepted: int, is_member: bool, expected: bool
) -> None:
    assert admits(around(3, accepted), is_member) == expected
    assert READERS_IN_MAX > MEMBERS_IN_MAX


@given(st.sampled_from(PEERS), st.sampled_from(PEERS))
def test_both_sides_keep_the_same_of_two_streams(one: PeerId, two: PeerId) -> None:
    """Whatever the order in which they see them."""
    if one == two:
        return

    def kept(me: PeerId, other: PeerId, first_is_mine: bool) -> PeerId:
        """The dialler of the stream that stays."""
        takes_second = prefers_new(me, other, first_is_mine, not first_is_mine)
        return me if first_is_mine != takes_second else other

    results = {
        kept(one, two, True), kept(one, two, False), kept(two, one, True), kept(two, one, False)
    }  # fmt: skip
    assert results == {min(one, two)}
    assert prefers_new(one, two, True, True)
    assert prefers_new(one, two, False, False)


def test_an_allowance_comes_back_with_time() -> None:
    allowance = Allowance(3, 0.5, 10.0)
    assert [allowance.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert not allowance.take(11.0)
    assert allowance.take(12.0)
    assert not allowance.is_full(12.0)
    assert allowance.is_full(100.0)
    assert [allowance.take(100.0, 2), allowance.take(100.0, 2)] == [True, False]


def test_an_allowance_stands_a_clock_that_stands() -> None:
    allowance = Allowance(1, 1.0, 5.0)
    assert allowance.take(4.0)
    assert not allowance.take(4.0)


@given(
    st.lists(
        st.tuples(st.sampled_from(PEERS), st.integers(0, 2**53), st.integers(0, 2**53)),
        max_size=20,
        unique=True,
    ),
    st.randoms(use_true_random=False),
)
def test_digests_tell_which_buckets_differ(
    items: list[tuple[PeerId, int, int]], rng: random.Random
) -> None:
    one, two, empty = RunningDigest(), RunningDigest(), RunningDigest()
    for peer, *sequence in items:
        one.toggle(peer, (sequence[0], sequence[1]))
    shuffled = rng.sample(items, len(items))
    for peer, *sequence in shuffled:
        two.toggle(peer, (sequence[0], sequence[1]))
    assert one.differing(two.pack()) == b""
    assert set(one.differing(empty.pack())) == {bucket_of(peer) for peer, *_ in items}
    for peer, *sequence in items:
        one.toggle(peer, (sequence[0], sequence[1]))
    assert one.pack() == empty.pack() == bytes(8 * DIGEST_BUCKETS)
