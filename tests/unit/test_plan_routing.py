"""Routing: chains cover, cost least, spare who is to be spared, and say what is missing."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span, missing_blocks
from shoal.plan.coordinates import Coordinate
from shoal.plan.routing import NEAR_TIE, Wanted, choose_chain, decode_step_s
from shoal.plan.view import Experience, ServerView, Stage, SwarmView
from tests.unit.plan_cases import (
    check_chain,
    every_chain,
    experiences,
    hops,
    peer,
    server,
    spans,
    swarm,
    swarms,
)
from tests.unit.plan_cases import stages as stages_of

NOTHING = Experience()


def rng(seed: int = 0) -> random.Random:
    return random.Random(seed)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_chain_covers_exactly_or_the_error_names_what_is_missing(data: st.DataObject) -> None:
    view = data.draw(swarms())
    span = data.draw(spans(view.num_blocks))
    experience = data.draw(experiences(view))
    usable = [one for one in view.servers if one.state != "joining"]
    missing = missing_blocks(span, [one.span for one in usable])
    if missing:
        with pytest.raises(NoRouteError) as caught:
            choose_chain(view, span, experience, rng())
        assert caught.value.missing == tuple((hole.start, hole.end) for hole in missing)
        assert all(str(hole) in caught.value.detail for hole in missing)
        return
    chain = choose_chain(view, span, experience, rng())
    check_chain(chain, span)
    by_peer = {one.peer: one for one in usable}
    assert all(by_peer[stage.peer].span.covers(stage.span) for stage in chain)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_chain_with_cuts_anywhere_is_better(data: st.DataObject) -> None:
    view = data.draw(swarms(num_blocks=5, servers_max=4))
    experience = data.draw(experiences(view))
    span = Span(0, 5)
    draining = {one.peer for one in view.servers if one.state == "draining"}

    def price(chain: tuple[Stage, ...] | list[Stage]) -> tuple[int, int, float]:
        return (
            sum(stage.peer in experience.avoid for stage in chain),
            sum(stage.peer in draining for stage in chain),
            decode_step_s(chain, view, experience),
        )

    everything = [price(chain) for chain in every_chain(view, span)]
    if not everything:
        with pytest.raises(NoRouteError):
            choose_chain(view, span, experience, rng())
        return
    best = min(everything)
    found = price(choose_chain(view, span, experience, rng()))
    assert found[:2] == best[:2]
    assert found[2] <= best[2] * (1 + NEAR_TIE) + 1e-9


CASES: list[tuple[str, SwarmView, Experience, list[tuple[int, int, int]]]] = [
    ("one server is enough", swarm(4, server(1, 0, 4)), NOTHING, [(1, 0, 4)]),
    (
        "a part of a span",
        swarm(4, server(1, 0, 3), server(2, 3, 4)),
        NOTHING,
        [(1, 0, 3), (2, 3, 4)],
    ),
    (
        "fewer hops",
        swarm(4, server(1, 0, 2), server(2, 2, 4), server(3, 0, 4)),
        NOTHING,
        [(3, 0, 4)],
    ),
    (
        "the fast server runs all it holds",
        swarm(4, server(1, 0, 4, decode_s=1.0), server(2, 1, 4, decode_s=0.001)),
        NOTHING,
        [(1, 0, 1), (2, 1, 4)],
    ),
    (
        "the near server",
        swarm(4, server(1, 0, 4), server(2, 0, 4)),
        Experience(rtt_s={peer(1): 0.2, peer(2): 0.01}),
        [(2, 0, 4)],
    ),
    (
        "an avoided peer is not used when others cover, at any price",
        swarm(4, server(1, 0, 4), server(2, 0, 2, decode_s=9.0), server(3, 2, 4, decode_s=9.0)),
        Experience(avoid=frozenset({peer(1)})),
        [(2, 0, 2), (3, 2, 4)],
    ),
    (
        "an avoided peer is used when nobody else covers",
        swarm(4, server(1, 0, 4)),
        Experience(avoid=frozenset({peer(1)})),
        [(1, 0, 4)],
    ),
    (
        "a draining server comes after slow ones",
        swarm(4, server(1, 0, 4, state="draining"), server(2, 0, 4, decode_s=0.5)),
        NOTHING,
        [(2, 0, 4)],
    ),
    (
        "a draining server when nobody else covers",
        swarm(4, server(1, 0, 4, state="draining"), server(2, 0, 2)),
        Experience(avoid=frozenset({peer(2)})),
        [(1, 0, 4)],
    ),
    (
        "a pair that can't reach each other costs a little more",
        swarm(4, server(1, 0, 2), server(2, 2, 4), server(3, 2, 4)),
        Experience(
            rtt_s={peer(number): 0.0 for number in (1, 2, 3)},
            unreachable_pairs=frozenset({(peer(1), peer(2))}),
        ),
        [(1, 0, 2), (3, 2, 4)],
    ),
]


@pytest.mark.parametrize(
    ("view", "experience", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_choice(
    view: SwarmView, experience: Experience, expected: list[tuple[int, int, int]]
) -> None:
    cheap = swarm(view.num_blocks, *view.servers)
    for seed in range(5):
        assert hops(choose_chain(cheap, Span(0, 4), experience, rng(seed))) == expected


def _kind(number: int, numerics: str, *, is_exact: bool, encoding: str) -> ServerView:
    return ServerView(
        peer=peer(number),
        addresses=(),
        span=Span(0, 4),
        numerics=numerics,
        is_exact=is_exact,
        encodings=(encoding,),
    )


KINDS = swarm(
    4,
    _kind(1, "a", is_exact=True, encoding="float32"),
    _kind(2, "a", is_exact=False, encoding="bfloat16"),
    _kind(3, "b", is_exact=True, encoding="bfloat16"),
)


@pytest.mark.parametrize(
    ("wanted", "allowed"),
    [
        (Wanted(), {1, 2, 3}),
        (Wanted(numerics="a"), {1, 2}),
        (Wanted(is_exact=True), {1, 3}),
        (Wanted(encoding="bfloat16"), {2, 3}),
        (Wanted(numerics="a", is_exact=True), {1}),
        (Wanted(numerics="b", encoding="float32"), set()),
    ],
    ids=str,
)
def test_only_wanted_servers(wanted: Wanted, allowed: set[int]) -> None:
    if not allowed:
        with pytest.raises(NoRouteError, match="relax what is asked"):
            choose_chain(KINDS, Span(0, 4), NOTHING, rng(), wanted=wanted)
        return
    found = {
        hops(choose_chain(KINDS, Span(0, 4), NOTHING, rng(s), wanted=wanted))[0][0]
        for s in range(40)
    }
    assert found == allowed


def test_equal_chains_share_the_load() -> None:
    view = swarm(4, *(server(number, 0, 4) for number in range(1, 5)))
    source = rng(7)
    count = Counter(hops(choose_chain(view, Span(0, 4), NOTHING, source))[0][0] for _ in range(400))
    assert all(60 <= count[number] <= 140 for number in range(1, 5)), count


def test_own_sessions_share_passes_and_drive_the_next_one_elsewhere() -> None:
    """One server is faster alone, the other with company: where the eighth session goes."""
    quick = replace(server(1, 0, 4), decode_s_by_batch=((1, 0.01), (8, 0.08)))
    broad = replace(server(2, 0, 4), decode_s_by_batch=((1, 0.02), (8, 0.024)))
    view = swarm(4, quick, broad)
    for sessions, best in (({}, 1), ({quick.peer: 7}, 2), ({broad.peer: 7}, 1)):
        experience = Experience(sessions=sessions)
        chain = choose_chain(view, Span(0, 4), experience, rng())
        assert hops(chain)[0][0] == best
    alone_s = decode_step_s(chain, view, Experience())
    company_s = decode_step_s(chain, view, Experience(sessions={quick.peer: 7}))
    assert company_s - alone_s == pytest.approx(4 * 0.07)


def test_the_same_view_and_rng_give_the_same_chain_in_any_order_of_servers() -> None:
    servers = [server(number, 0, 4) for number in range(1, 6)]
    one = choose_chain(swarm(4, *servers), Span(0, 4), NOTHING, rng(3))
    two = choose_chain(swarm(4, *reversed(servers)), Span(0, 4), NOTHING, rng(3))
    assert one == two


def test_the_error_names_the_blocks_and_who_is_about_to_help() -> None:
    view = swarm(30, server(1, 0, 12), server(2, 20, 30), server(3, 12, 20, state="joining"))
    with pytest.raises(NoRouteError, match=r"no server holds blocks \[12,20\) .*joining") as caught:
        choose_chain(view, Span(0, 30), NOTHING, rng())
    assert caught.value.missing == ((12, 20),)


def test_who_is_entered_anew_at_a_border_is_still_left_from_where_it_came() -> None:
    """The quick first server can't reach the last one: nobody runs nothing to help it there."""
    spans_s = {1: (0, 2, 0.06), 2: (0, 1, 0.001), 3: (1, 3, 0.001)}
    here = Coordinate(point=(0.0, 0.0, 0.0), height=0.0, error=0.1)
    view = swarm(
        3,
        *(
            replace(server(number, start, end, decode_s=decode_s), coordinate=here)
            for number, (start, end, decode_s) in spans_s.items()
        ),
    )
    experience = Experience(
        rtt_s={one.peer: 0.1 for one in view.servers},
        unreachable_pairs=frozenset({(peer(2), peer(3))}),
    )
    for seed in range(5):
        chain = choose_chain(view, Span(0, 3), experience, rng(seed))
        assert hops(chain) == [(1, 0, 1), (3, 1, 3)]


def test_peers_doubled_in_the_view_are_refused() -> None:
    view = swarm(4, server(1, 0, 2), server(1, 2, 4))
    with pytest.raises(ValueError, match="one server per peer"):
        choose_chain(view, Span(0, 4), NOTHING, rng())


def test_predicted_time_counts_hops_blocks_and_links_via_the_client() -> None:
    view = swarm(4, server(1, 0, 2, decode_s=0.5), server(2, 2, 4))
    chain = stages_of((1, 0, 2), (9, 2, 4))
    known = Experience(rtt_s={peer(1): 1.0})
    direct = decode_step_s(chain, view, known)
    cut = Experience(rtt_s={peer(1): 1.0}, unreachable_pairs=frozenset({(peer(1), peer(9))}))
    assert direct == pytest.approx(1.0 + 2 * 0.5 + 0.1 + 2 * 0.01 + 2 * 0.001)
    assert decode_step_s(chain, view, cut) == pytest.approx(direct + 0.002)


def test_who_was_not_measured_is_estimated_by_its_coordinate() -> None:
    here = Coordinate(error=0.1)
    near = Coordinate(point=(0.02, 0.0, 0.0), error=0.1)
    far = Coordinate(point=(0.3, 0.0, 0.0), error=0.1)
    one, other = server(0, 0, 4), server(1, 0, 4)
    view = swarm(4, replace(one, coordinate=far), replace(other, coordinate=near))
    for seed in range(8):
        (stage,) = choose_chain(view, Span(0, 4), Experience(coordinate=here), rng(seed))
        assert stage.peer == other.peer
        measured = Experience(coordinate=here, rtt_s={one.peer: 0.005})
        (stage,) = choose_chain(view, Span(0, 4), measured, rng(seed))
        assert stage.peer == one.peer, "what was measured goes before"
