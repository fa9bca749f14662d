"""Standbys and moves: who may stand beside a chain, who takes over, when a session moves."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.spans import Span
from shoal.plan.moving import (
    can_move,
    choose_departure,
    choose_migration,
    choose_standbys,
    keep_valid,
    promote,
)
from shoal.plan.spec import DecodeTimes
from shoal.plan.view import Experience, Stage, SwarmView
from tests.unit.plan_cases import (
    check_chain,
    every_chain,
    hops,
    peer,
    server,
    stages,
    swarm,
    swarms,
)

NOTHING = Experience()
CHAIN = stages((1, 0, 2), (2, 2, 4), (3, 4, 6))


def rng() -> random.Random:
    return random.Random(0)


@pytest.mark.parametrize(
    ("lost", "standbys", "expected"),
    [
        ({2}, [(4, 2, 4)], [(1, 0, 2), (4, 2, 4), (3, 4, 6)]),
        ({2}, [(4, 2, 3), (5, 3, 4)], [(1, 0, 2), (4, 2, 3), (5, 3, 4), (3, 4, 6)]),
        ({2}, [(4, 2, 3)], [(1, 0, 2), (2, 2, 4), (3, 4, 6)]),
        ({1, 2}, [(4, 0, 4)], [(4, 0, 4), (3, 4, 6)]),
        ({1, 2}, [(4, 0, 2), (5, 2, 4)], [(4, 0, 2), (5, 2, 4), (3, 4, 6)]),
        ({1, 2}, [(5, 2, 4)], [(1, 0, 2), (5, 2, 4), (3, 4, 6)]),
        ({2, 4}, [(4, 2, 4)], [(1, 0, 2), (2, 2, 4), (3, 4, 6)]),
        ({1, 3}, [(4, 0, 2), (5, 4, 6)], [(4, 0, 2), (2, 2, 4), (5, 4, 6)]),
        (set(), [(4, 2, 4)], [(1, 0, 2), (2, 2, 4), (3, 4, 6)]),
    ],
    ids=["same span", "two for one", "half", "one for two", "both", "one of both", "lost as well",
         "two gaps", "nothing lost"],
)  # fmt: skip
def test_promotion(lost, standbys, expected):
    found = promote(CHAIN, {peer(number) for number in lost}, stages(*standbys))
    assert hops(found) == expected


@pytest.mark.parametrize(
    ("standbys", "kept"),
    [
        ([(4, 2, 4)], [(4, 2, 4)]),
        ([(4, 3, 4)], []),
        ([(4, 2, 3), (5, 3, 5)], [(4, 2, 3), (5, 3, 5)]),
        ([(5, 3, 5), (4, 2, 3)], [(4, 2, 3), (5, 3, 5)]),
        ([(1, 0, 4)], []),
        ([(1, 2, 4)], [(1, 2, 4)]),
        ([(2, 0, 4)], []),
        ([(4, 2, 4), (4, 2, 3)], [(4, 2, 4)]),
    ],
    ids=["beside", "unfed", "fed by a standby", "in any order", "same begin", "extension",
         "same end", "twice"],
)  # fmt: skip
def test_who_may_stand_beside_a_chain(standbys, kept):
    assert hops(keep_valid(CHAIN, stages(*standbys))) == kept


def test_every_hop_gets_a_standby_of_its_class():
    view = swarm(
        6, server(1, 0, 2), server(2, 2, 4), server(3, 4, 6), server(4, 0, 4),
        server(5, 4, 6, numerics="b"), server(6, 4, 6),
    )  # fmt: skip
    classes = {peer(number): "a" for number in (1, 2, 3)}
    found = choose_standbys(view, CHAIN, (), NOTHING, classes, rng())
    assert hops(found) == [(4, 0, 2), (4, 2, 4), (6, 4, 6)]


def test_peers_outside_the_chain_stand_by_first():
    view = swarm(4, server(1, 0, 4), server(2, 0, 4), server(3, 2, 4, decode_s=0.4))
    chain = stages((1, 0, 2), (2, 2, 4))
    found = choose_standbys(view, chain, (), NOTHING, {}, rng())
    assert hops(found) == [(2, 0, 2), (3, 2, 4)]


def test_who_stands_by_stays():
    view = swarm(6, server(4, 2, 4), server(5, 2, 4), server(6, 2, 4))
    present = stages((5, 2, 4))
    for count, expected in ((1, 1), (2, 2), (5, 3)):
        found = choose_standbys(view, CHAIN, present, NOTHING, {}, rng(), count=count)
        assert hops(found)[0] == (5, 2, 4)
        assert len(found) == expected


@pytest.mark.parametrize("state", ["draining", "joining"])
def test_who_leaves_or_comes_does_not_stand_by(state):
    view = swarm(6, server(4, 2, 4, state=state))
    assert choose_standbys(view, CHAIN, (), NOTHING, {}, rng()) == ()


def test_a_leaving_server_is_replaced_and_nothing_else():
    view = swarm(6, server(1, 0, 2), server(2, 2, 4), server(3, 4, 6), server(4, 1, 5))
    found = choose_departure(view, CHAIN, {CHAIN[1]}, NOTHING, "a", rng())
    assert found is not None
    assert hops(found) == [(1, 0, 2), (4, 2, 4), (3, 4, 6)]


def test_a_neighbour_extends_when_a_server_leaves():
    view = swarm(6, server(1, 0, 4), server(2, 2, 4), server(3, 4, 6))
    found = choose_departure(view, CHAIN, {CHAIN[1]}, NOTHING, "a", rng())
    assert found is not None
    assert hops(found) == [(1, 0, 2), (1, 2, 4), (3, 4, 6)]


@pytest.mark.parametrize(
    "others", [[], [server(4, 2, 3)], [server(4, 2, 4)]], ids=["nobody", "half", "avoided"]
)
def test_nowhere_to_go(others):
    view = swarm(6, server(1, 0, 2), server(2, 2, 4), server(3, 4, 6), *others)
    experience = Experience(avoid=frozenset({peer(4)}))
    assert choose_departure(view, CHAIN, {CHAIN[1]}, experience, "a", rng()) is None


@pytest.mark.parametrize(
    ("slowness", "expected"),
    [(1.0, None), (1.2, None), (10.0, [(1, 0, 2), (4, 2, 4)])],
)
def test_a_session_leaves_a_server_that_became_much_slower(slowness, expected):
    view = swarm(
        4, server(1, 0, 2, decode_s=0.01), server(2, 2, 4, decode_s=0.01),
        server(4, 2, 4, decode_s=0.01),
    )  # fmt: skip
    near = {peer(number): 0.001 for number in (1, 2, 4)}
    experience = Experience(rtt_s=near, slowness={peer(2): slowness})
    found = choose_migration(view, stages((1, 0, 2), (2, 2, 4)), experience, "a", rng())
    assert (None if found is None else hops(found)) == expected


def test_no_migration_to_another_class():
    view = swarm(4, server(1, 0, 4, decode_s=1.0), server(2, 0, 4, decode_s=0.001, numerics="b"))
    assert choose_migration(view, stages((1, 0, 4)), NOTHING, "a", rng()) is None


LINEAR = ((1, 0.01), (64, 0.64))
"""Decode times of a server that runs rows one by one."""


def twins(count: int, *, points: tuple[tuple[int, float], ...] = LINEAR) -> SwarmView:
    """Servers of all 4 blocks, all alike."""
    return swarm(
        4,
        *(
            replace(server(number, 0, 4, decode_s=0.01), decode_s_by_batch=points)
            for number in range(1, count + 1)
        ),
    )


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0.0, 60.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_session_moves_between_equal_servers(seed, is_measured, wait_s, is_split):
    """Neither for its own rows, nor since its own servers have no room for others."""
    view, chain = twins(2), stages((1, 0, 4))
    if is_split:
        halves = {1: Span(0, 2), 2: Span(0, 2), 3: Span(2, 4), 4: Span(2, 4)}
        servers = zip(twins(4).servers, halves.values(), strict=True)
        view = swarm(4, *(replace(one, span=span) for one, span in servers))
        chain = stages((1, 0, 2), (3, 2, 4))
    mine = [stage.peer for stage in chain]
    experience = Experience(
        rtt_s={one.peer: 0.01 for one in view.servers},
        sessions=dict.fromkeys(mine, 1),
        waits_s=dict.fromkeys(mine, wait_s),
        slowness=dict.fromkeys(mine, 1.0) if is_measured else {},
    )
    assert choose_migration(view, chain, experience, "a", random.Random(seed)) is None


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=6),
    st.booleans(),
    st.sampled_from([LINEAR, ((1, 0.01), (4, 0.012), (64, 0.3)), ()]),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_sessions_settle(homes, is_one_client, points, seed):
    """Each looks in turn, at servers that tell what passes of their sessions' rows take."""
    view, source, moves = twins(3, points=points), random.Random(seed), 0
    times = DecodeTimes(points=points or ((1, 0.01),))
    where = [peer(number) for number in homes]
    for turn in range(60):
        number = turn % len(where)
        shared = Counter(where)
        experience = Experience(
            rtt_s={one.peer: 0.001 for one in view.servers},
            sessions=shared if is_one_client else {where[number]: 1},
            slowness={one: times.at(count) / 0.01 for one, count in shared.items()},
        )
        chain = (Stage(peer=where[number], span=Span(0, 4)),)
        target = choose_migration(view, chain, experience, "a", source)
        if target is None:
            continue
        moves += 1
        (stage,) = target
        assert times.at(shared[stage.peer] + 1) < times.at(shared[where[number]])
        where[number] = stage.peer
    assert moves <= len(where)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_standbys_always_fit_and_take_over(data: st.DataObject) -> None:
    view = data.draw(swarms(num_blocks=5, servers_max=5))
    view = swarm(5, *view.servers, server(99, 0, 5))
    chain: tuple[Stage, ...] = tuple(
        data.draw(st.sampled_from(list(every_chain(view, Span(0, 5)))))
    )
    found = choose_standbys(view, chain, (), NOTHING, {}, rng())
    assert keep_valid(chain, found) == found
    assert can_move(chain, found)
    lost = {data.draw(st.sampled_from([stage.peer for stage in chain]))}
    after = promote(chain, lost, found)
    check_chain(after, Span(0, 5), kept=after)
    assert all(stage in chain or stage in found for stage in after)


def test_what_a_leaving_server_runs_of_other_blocks_stays():
    """It went to the blocks in front, and the session has followed it there already."""
    view = swarm(4, server(1, 0, 3), server(2, 2, 4))
    chain = stages((1, 0, 2), (1, 2, 4))
    found = choose_departure(view, chain, {chain[1]}, NOTHING, "a", rng())
    assert found is not None
    assert hops(found) == [(1, 0, 2), (2, 2, 4)]
