"""Ways between servers as a client knows them: bounds, liars, and what they do to routes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.spans import Span
from shoal.plan.coordinates import Coordinate
from shoal.plan.cost import HOP_S, RTT_UNKNOWN_S, VIA_CLIENT_S, push_entry_s
from shoal.plan.moving import choose_migration, choose_standbys
from shoal.plan.repair import choose_repair
from shoal.plan.routing import choose_chain, decode_step_s
from shoal.plan.view import Experience, SwarmView
from shoal.plan.ways import Place, Ways, rtt_between_s, ways_of
from tests.unit.plan_cases import hops, peer, server, stages, swarm

ONE, OTHER = peer(1), peer(2)


def at(x_s: float, y_s: float = 0.0, *, error: float = 0.1) -> Coordinate:
    return Coordinate(point=(x_s, y_s, 0.0), height=0.0, error=error)


@pytest.mark.parametrize(
    ("one", "other", "expected_s"),
    [
        (Place(rtt_s=0.05, is_measured=True), Place(rtt_s=0.03, is_measured=True), 0.08),
        (Place(), Place(rtt_s=0.03, is_measured=True), RTT_UNKNOWN_S + 0.03),
        (
            Place(rtt_s=0.05, is_measured=True, coordinate=at(0.0)),
            Place(rtt_s=0.03, is_measured=True, coordinate=at(0.04)),
            0.04,
        ),
        (
            Place(rtt_s=0.05, is_measured=True, coordinate=at(0.0)),
            Place(rtt_s=0.03, is_measured=True, coordinate=at(0.0)),
            0.02,
        ),
        (
            Place(rtt_s=0.05, is_measured=True, coordinate=at(0.0)),
            Place(rtt_s=0.03, is_measured=True, coordinate=at(9.0)),
            0.08,
        ),
        (Place(rtt_s=0.05, coordinate=at(0.0)), Place(coordinate=at(0.001)), 0.001),
        (
            Place(rtt_s=0.05, is_measured=True, coordinate=at(0.0)),
            Place(rtt_s=0.03, is_measured=True, coordinate=at(0.04, error=1.0)),
            0.08,
        ),
    ],
    ids=[
        "nobody knows", "not even measured", "coordinates", "no nearer than the difference",
        "no farther than via the client", "what is not measured bounds nothing", "unsure",
    ],
)  # fmt: skip
def test_a_way_between_servers_is_within_the_triangle(one, other, expected_s):
    assert rtt_between_s(one, other) == pytest.approx(expected_s)
    assert rtt_between_s(other, one) == pytest.approx(expected_s)
    push = Ways({ONE: one, OTHER: other})
    assert push.entries(OTHER)[ONE] == pytest.approx(push_entry_s(expected_s))
    assert push.entries(OTHER)[None] == pytest.approx(other.rtt_s / 2 + HOP_S)
    assert push.leave_s(OTHER, None) == pytest.approx(other.rtt_s / 2)
    assert push.leave_s(ONE, OTHER) == push.entries(OTHER)[ONE]


def test_pairs_that_don_t_meet_pay_for_the_way_over_the_client():
    places = {
        ONE: Place(rtt_s=0.05, is_measured=True, coordinate=at(0.0)),
        OTHER: Place(rtt_s=0.03, is_measured=True, coordinate=at(0.03)),
    }
    ways = Ways(places, frozenset({(ONE, OTHER)}))
    assert ways.entries(OTHER)[ONE] == pytest.approx(push_entry_s(0.08) + VIA_CLIENT_S)
    assert ways.entries(ONE)[OTHER] == pytest.approx(push_entry_s(0.03))


def test_a_hop_at_the_same_server_is_no_way():
    assert Ways({}).entries(ONE)[ONE] == HOP_S


def test_nonsense_is_no_coordinate():
    mad = replace(server(1, 0, 4), coordinate=replace(at(0.0), height=-5.0))
    fine = replace(server(2, 0, 4), coordinate=at(0.02))
    experience = Experience(rtt_s={ONE: 0.05, OTHER: 0.03})
    assert ways_of([mad, fine], experience).entries(OTHER)[ONE] == push_entry_s(0.08)


ANYWHERE = st.builds(
    Coordinate,
    point=st.tuples(*[st.floats(-10, 10)] * 3),
    height=st.floats(0, 10),
    error=st.floats(0, 0.5),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(ANYWHERE, st.floats(0, 1)), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_no_lie_makes_a_chain_faster_than_the_way_to_its_farthest_server(said, rng):
    """Whatever servers say of their places: the client has measured how far each is."""
    count = len(said)
    view = swarm(
        count,
        *(
            replace(server(number, number, number + 1), coordinate=place)
            for number, (place, _) in enumerate(said)
        ),
    )
    experience = Experience(rtt_s={peer(number): rtt_s for number, (_, rtt_s) in enumerate(said)})
    chain = choose_chain(view, Span(0, count), experience, rng)
    seconds = decode_step_s(chain, view, experience)
    handled_s = count * (HOP_S + 0.01)
    assert seconds >= max(rtt_s for _, rtt_s in said) + handled_s - 1e-9
    assert seconds <= sum(rtt_s for _, rtt_s in said) + handled_s + 1e-9


def two_sites() -> tuple[SwarmView, Experience]:
    """West and east of the client 50 ms away, and a site 60 ms away with both halves."""
    places = {1: at(-0.05), 2: at(0.05), 3: at(0.0, 0.06), 4: at(0.001, 0.06)}
    spans = {1: (0, 4), 2: (4, 8), 3: (0, 4), 4: (4, 8)}
    view = swarm(
        8,
        *(replace(server(one, *spans[one]), coordinate=places[one]) for one in places),
    )
    near_s = {1: 0.05, 2: 0.05, 3: 0.06, 4: 0.06}
    return view, Experience(rtt_s={peer(one): rtt_s for one, rtt_s in near_s.items()})


def test_two_near_servers_far_away_beat_a_zigzag_between_nearer_ones():
    view, experience = two_sites()
    for seed in range(5):
        pushed = choose_chain(view, Span(0, 8), experience, random.Random(seed))
        assert hops(pushed) == [(3, 0, 4), (4, 4, 8)]
        relayed = choose_chain(view, Span(0, 8), experience, random.Random(seed), flow="hub")
        assert hops(relayed) == [(1, 0, 4), (2, 4, 8)]
    zigzag = stages((1, 0, 4), (2, 4, 8))
    assert decode_step_s(zigzag, view, experience) > 1.2 * decode_step_s(pushed, view, experience)


def test_repairs_and_standbys_are_near_those_who_send_to_them():
    view, experience = two_sites()
    view = replace(view, servers=(*view.servers, replace(server(5, 0, 4), coordinate=at(0, 0.061))))
    experience = replace(experience, rtt_s=experience.rtt_s | {peer(5): 0.061})
    chain = stages((3, 0, 4), (4, 4, 8))
    for seed in range(5):
        rng = random.Random(seed)
        mended = choose_repair(view, chain, frozenset({0}), experience, "", rng)
        assert hops(mended) == [(5, 0, 4), (4, 4, 8)]
        beside = choose_standbys(view, chain, (), experience, {}, rng)
        assert hops(beside)[0] == (5, 0, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_coordinates_that_wander_by_a_tenth_move_no_session(seed):
    """Places are estimates that never stand still; a session moves for a gain of 30 %."""
    rng = random.Random(seed)
    view, experience = two_sites()
    other = swarm(8, *view.servers[2:], replace(server(5, 0, 8), coordinate=at(0.0, 0.062)))
    known = replace(experience, rtt_s=experience.rtt_s | {peer(5): 0.062})
    chain = choose_chain(other, Span(0, 8), known, rng)
    for _ in range(20):
        moved = []
        for one in other.servers:
            x_s, y_s, _ = one.coordinate.point
            place = at(x_s + rng.uniform(-0.006, 0.006), y_s + rng.uniform(-0.006, 0.006))
            moved.append(replace(one, coordinate=place))
        now = replace(other, servers=tuple(moved))
        assert choose_migration(now, chain, known, "a", rng) is None


def test_rows_take_longer_to_leave_over_a_thin_line():
    experience = Experience(rtt_s={ONE: 0.02, OTHER: 0.02})
    thin = replace(server(1, 0, 2), sent_bytes_per_s=2e6)
    ways = ways_of([thin, server(2, 2, 4)], experience, hidden_size=4096)
    free = ways_of([server(1, 0, 2), server(2, 2, 4)], experience, hidden_size=4096)
    row_s = 2 * 4096 / 2e6
    assert ways.entries(OTHER)[ONE] == pytest.approx(free.entries(OTHER)[ONE] + row_s)
    assert ways.leave_s(ONE, None) == pytest.approx(free.leave_s(ONE, None) + row_s)
    assert ways.entries(ONE)[OTHER] == free.entries(ONE)[OTHER], "what comes in is not its affair"
    assert ways.entries(ONE)[None] == free.entries(ONE)[None]


def test_a_slow_start_of_tcp_is_not_taken_for_a_thin_line():
    experience = Experience(rtt_s={ONE: 0.02, OTHER: 0.02})
    absurd = replace(server(1, 0, 2), sent_bytes_per_s=3.0)
    ways = ways_of([absurd, server(2, 2, 4)], experience, hidden_size=1000)
    assert ways.entries(OTHER)[ONE] == pytest.approx(push_entry_s(0.04) + 0.002)


def test_of_two_alike_the_one_with_the_thicker_line_is_taken():
    thin, thick = (
        replace(server(number, 0, 4), sent_bytes_per_s=rate)
        for number, rate in ((1, 1e6), (2, 1e8))
    )
    view = SwarmView(model="m", num_blocks=4, hidden_size=8192, servers=(thin, thick))
    experience = Experience(rtt_s={ONE: 0.02, OTHER: 0.02})
    for seed in range(8):
        chain = choose_chain(view, Span(0, 4), experience, random.Random(seed))
        assert [stage.peer for stage in chain] == [OTHER]
