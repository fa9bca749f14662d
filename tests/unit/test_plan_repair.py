"""Repair: living hops stay, gaps are filled, and only living hops are extended by their peer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span, missing_blocks
from shoal.plan.repair import choose_repair, merge_neighbours, with_client_links
from shoal.plan.routing import Wanted
from shoal.plan.view import Experience, Stage, SwarmView
from tests.unit.plan_cases import (
    check_chain,
    every_chain,
    experiences,
    hops,
    peer,
    server,
    stages,
    swarm,
    swarms,
)

NOTHING = Experience()


def rng(seed: int = 0) -> random.Random:
    return random.Random(seed)


def _gaps(chain: tuple[Stage, ...], lost: frozenset[int]) -> list[Span]:
    living = [stage.span for index, stage in enumerate(chain) if index not in lost]
    return missing_blocks(Span(chain[0].span.start, chain[-1].span.end), living)


def _fits(view: SwarmView, gap: Span, spared: set[bytes]) -> bool:
    """Whether unspared servers can fill `gap`."""
    return any(not spared & {stage.peer for stage in way} for way in every_chain(view, gap))


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_living_hops_stay_and_gaps_are_filled(data: st.DataObject) -> None:
    view = data.draw(swarms(num_blocks=5, servers_max=5))
    experience = data.draw(experiences(view))
    view = swarm(5, *view.servers, server(99, 0, 5))
    before = list(every_chain(view, Span(0, 5)))
    chain = tuple(data.draw(st.sampled_from(before)))
    lost = data.draw(st.frozensets(st.integers(0, len(chain) - 1)))
    gone = data.draw(st.frozensets(st.sampled_from([one.peer for one in view.servers])))
    view = swarm(5, *(one for one in view.servers if one.peer not in gone))
    usable = [one.span for one in view.servers if one.state != "joining"]
    gaps = _gaps(chain, lost)
    missing = [hole for gap in gaps for hole in missing_blocks(gap, usable)]
    living = {stage for index, stage in enumerate(chain) if index not in lost}
    spared = {chain[index].peer for index in lost} - {stage.peer for stage in living}
    spared |= experience.avoid
    if missing:
        with pytest.raises(NoRouteError) as caught:
            choose_repair(view, chain, lost, experience, "a", rng())
        assert caught.value.missing == tuple((hole.start, hole.end) for hole in missing)
        return
    found = choose_repair(view, chain, lost, experience, "a", rng())
    check_chain(found, Span(0, 5), living)
    by_peer = {one.peer: one for one in view.servers if one.state != "joining"}
    assert all(stage in living or by_peer[stage.peer].span.covers(stage.span) for stage in found)
    if all(_fits(view, gap, spared) for gap in gaps):
        assert living <= set(found)
        assert not spared & {stage.peer for stage in set(found) - living}


CASES: list[
    tuple[str, SwarmView, list[tuple[int, int, int]], set[int], list[tuple[int, int, int]]]
] = [
    (
        "a gap in the middle",
        swarm(30, server(1, 0, 12), server(4, 10, 22), server(3, 20, 30)),
        [(1, 0, 12), (2, 12, 20), (3, 20, 30)],
        {1},
        [(1, 0, 12), (4, 12, 20), (3, 20, 30)],
    ),
    (
        "two lost neighbours are one gap",
        swarm(30, server(4, 0, 20)),
        [(1, 0, 12), (2, 12, 20), (3, 20, 30)],
        {0, 1},
        [(4, 0, 20), (3, 20, 30)],
    ),
    (
        "two gaps around a living hop",
        swarm(30, server(4, 12, 20), server(5, 0, 15), server(6, 20, 30)),
        [(1, 0, 12), (2, 12, 20), (3, 20, 30)],
        {0, 2},
        [(5, 0, 12), (2, 12, 20), (6, 20, 30)],
    ),
    (
        "a living hop that is in no record stays",
        swarm(20, server(4, 10, 20)),
        [(1, 0, 10), (2, 10, 20)],
        {1},
        [(1, 0, 10), (4, 10, 20)],
    ),
    (
        "the same class before a faster one of another class",
        swarm(20, server(4, 10, 20, decode_s=0.5), server(5, 10, 20, numerics="b")),
        [(1, 0, 10), (2, 10, 20)],
        {1},
        [(1, 0, 10), (4, 10, 20)],
    ),
    (
        "another class before nobody",
        swarm(20, server(5, 10, 20, numerics="b")),
        [(1, 0, 10), (2, 10, 20)],
        {1},
        [(1, 0, 10), (5, 10, 20)],
    ),
    (
        "another class before the peer that was just lost",
        swarm(20, server(2, 10, 20), server(5, 10, 20, numerics="b")),
        [(1, 0, 10), (2, 10, 20)],
        {1},
        [(1, 0, 10), (5, 10, 20)],
    ),
    (
        "the peer that was just lost before nobody",
        swarm(20, server(2, 10, 20)),
        [(1, 0, 10), (2, 10, 20)],
        {1},
        [(1, 0, 10), (2, 10, 20)],
    ),
    (
        "a neighbour that extends its hop before another class",
        swarm(20, server(1, 0, 20), server(5, 10, 20, numerics="b")),
        [(1, 0, 10), (2, 10, 20)],
        {1},
        [(1, 0, 10), (1, 10, 20)],
    ),
    (
        "only a neighbour is left: it extends its hop",
        swarm(30, server(1, 0, 20), server(3, 20, 30)),
        [(1, 0, 12), (2, 12, 20), (3, 20, 30)],
        {1},
        [(1, 0, 12), (1, 12, 20), (3, 20, 30)],
    ),
    (
        "a neighbour extends to the left before the peer that was just lost",
        swarm(30, server(1, 0, 12), server(2, 12, 20), server(3, 12, 30)),
        [(1, 0, 12), (2, 12, 20), (3, 20, 30)],
        {1},
        [(1, 0, 12), (3, 12, 20), (3, 20, 30)],
    ),
    (
        "both neighbours are one peer",
        swarm(30, server(1, 0, 30)),
        [(1, 0, 12), (2, 12, 20), (1, 20, 30)],
        {1},
        [(1, 0, 12), (1, 12, 20), (1, 20, 30)],
    ),
    (
        "relays of the old chain are dropped",
        swarm(20, server(4, 10, 20)),
        [(1, 0, 10), (9, 10, 10), (2, 10, 20)],
        {2},
        [(1, 0, 10), (4, 10, 20)],
    ),
    (
        "nothing lost, nothing changed",
        swarm(20),
        [(1, 0, 10), (2, 10, 20)],
        set(),
        [(1, 0, 10), (2, 10, 20)],
    ),
]


@pytest.mark.parametrize(
    ("view", "chain", "lost", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_choice(
    view: SwarmView,
    chain: list[tuple[int, int, int]],
    lost: set[int],
    expected: list[tuple[int, int, int]],
) -> None:
    for seed in range(5):
        found = choose_repair(view, stages(*chain), frozenset(lost), NOTHING, "a", rng(seed))
        assert hops(found) == expected


def test_without_a_preferred_class_speed_decides() -> None:
    view = swarm(20, server(4, 10, 20, decode_s=0.5), server(5, 10, 20, numerics="b"))
    chain = stages((1, 0, 10), (2, 10, 20))
    assert hops(choose_repair(view, chain, frozenset({1}), NOTHING, "", rng()))[1] == (5, 10, 20)


def test_a_strict_class_extends_a_neighbour_rather_than_cross() -> None:
    view = swarm(20, server(1, 0, 20), server(5, 10, 20, numerics="b"))
    chain = stages((1, 0, 10), (2, 10, 20))
    strict = Wanted(numerics="a")
    found = choose_repair(view, chain, frozenset({1}), NOTHING, "a", rng(), wanted=strict)
    assert hops(found) == [(1, 0, 10), (1, 10, 20)]


def test_equal_replacements_share_the_load() -> None:
    view = swarm(20, *(server(number, 10, 20) for number in range(4, 8)))
    chain = stages((1, 0, 10), (2, 10, 20))
    source = rng(1)
    used = {
        hops(choose_repair(view, chain, frozenset({1}), NOTHING, "a", source))[1][0]
        for _ in range(60)
    }
    assert used == {4, 5, 6, 7}


def test_uncovered_blocks_are_named() -> None:
    view = swarm(30, server(4, 14, 16), server(5, 0, 12))
    chain = stages((1, 0, 12), (2, 12, 20), (3, 20, 30))
    with pytest.raises(NoRouteError, match=r"\[12,14\) and \[16,20\)") as caught:
        choose_repair(view, chain, frozenset({1}), NOTHING, "a", rng())
    assert caught.value.missing == ((12, 14), (16, 20))


def test_a_neighbour_that_moved_follows_itself() -> None:
    view = swarm(20, server(1, 10, 20))
    chain = stages((1, 0, 10), (2, 10, 20))
    found = choose_repair(view, chain, frozenset({1}), NOTHING, "a", rng())
    assert hops(found) == [(1, 0, 10), (1, 10, 20)]


@pytest.mark.parametrize(
    ("chain", "lost"),
    [([], set()), ([(1, 0, 4)], {1}), ([(1, 0, 4)], {-1}), ([(1, 0, 4), (2, 5, 6)], {0})],
)
def test_nonsense_is_refused(chain: list[tuple[int, int, int]], lost: set[int]) -> None:
    with pytest.raises(ValueError):
        choose_repair(swarm(6), stages(*chain), frozenset(lost), NOTHING, "a", rng())


def test_client_links_are_put_where_they_are_needed_and_nowhere_else() -> None:
    chain = stages((1, 0, 4), (2, 4, 6), (3, 6, 8))
    assert with_client_links(chain, NOTHING, peer(9)) == list(chain)
    cut = Experience(unreachable_pairs=frozenset({(peer(2), peer(3)), (peer(2), peer(1))}))
    linked = with_client_links(chain, cut, peer(9))
    assert hops(linked) == [(1, 0, 4), (2, 4, 6), (9, 6, 6), (3, 6, 8)]
    assert with_client_links(linked, cut, peer(9)) == linked
    assert with_client_links(linked, NOTHING, peer(9)) == list(chain)


def test_neighbouring_hops_of_one_peer_become_one_where_it_holds_both() -> None:
    view = swarm(6, server(1, 0, 4), server(2, 4, 6))
    chain = stages((1, 0, 2), (1, 2, 4), (2, 4, 5), (2, 5, 6))
    assert hops(merge_neighbours(chain, view)) == [(1, 0, 4), (2, 4, 6)]
    moved = swarm(6, server(1, 2, 6), server(2, 4, 6))
    assert hops(merge_neighbours(chain[:3], moved)) == hops(chain[:3])
