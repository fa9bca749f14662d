"""Lanes and cuts of a training batch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import NoRouteError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.lanes import choose_lanes, choose_witness, cut_batch, micro_tokens
from shoal.plan.view import Experience, ServerView, Stage, SwarmView


def view_of(*spans: tuple[int, int], draining: tuple[int, ...] = ()) -> SwarmView:
    servers = tuple(
        ServerView(
            peer=PeerId(bytes([index]) * 32),
            addresses=(),
            span=Span(*span),
            state="draining" if index in draining else "online",
        )
        for index, span in enumerate(spans)
    )
    return SwarmView(model="m", num_blocks=4, hidden_size=8, servers=servers)


def lanes_of(view: SwarmView, most: int = 8, **known: frozenset[PeerId]) -> list[list[int]]:
    lanes = choose_lanes(
        view, Span(0, 4), Experience(**known), random.Random(1), lanes_max=most
    )  # fmt: skip
    for lane in lanes:
        assert lane[0].span.start == 0
        assert lane[-1].span.end == 4
    return [[stage.peer[0] for stage in lane] for lane in lanes]


def test_lanes_share_no_server_and_use_all() -> None:
    found = lanes_of(view_of((0, 4), (0, 2), (2, 4), (0, 4), (0, 2)))
    used = [peer for lane in found for peer in lane]
    assert len(used) == len(set(used))
    assert len(found) == 3


def test_no_more_lanes_than_wanted() -> None:
    assert len(lanes_of(view_of((0, 4), (0, 4), (0, 4)), most=2)) == 2


def test_avoided_and_draining_servers_are_for_the_first_lane_only() -> None:
    bad = frozenset({PeerId(bytes([1]) * 32)})
    assert lanes_of(view_of((0, 4), (0, 4)), avoid=bad) == [[0]]
    assert lanes_of(view_of((0, 4), (0, 4), draining=(1,))) == [[0]]
    assert lanes_of(view_of((0, 2), (2, 4), draining=(1,))) == [[0, 1]]


def test_missing_blocks_are_named() -> None:
    with pytest.raises(NoRouteError, match=r"\[2,4\)"):
        lanes_of(view_of((0, 2)))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 100))
def test_cuts_hold_every_sequence_once_in_order(lengths: list[int], most: int) -> None:
    cuts = cut_batch(tuple(lengths), most)
    assert [index for start, end in cuts for index in range(start, end)] == list(
        range(len(lengths))
    )
    for start, end in cuts:
        assert end - start == 1 or sum(lengths[start:end]) <= most


def test_a_witness_has_the_same_blocks_and_was_not_asked() -> None:
    view = view_of((0, 4), (0, 2), (0, 4), (0, 4), draining=(3,))
    first = Stage(peer=view.servers[0].peer, span=Span(1, 3))
    rng = random.Random(1)
    found = choose_witness(view, first, frozenset({first.peer}), rng)
    assert found == Stage(peer=view.servers[2].peer, span=Span(1, 3))
    both = frozenset({first.peer, view.servers[2].peer})
    assert choose_witness(view, first, both, rng) is None


def test_witnesses_of_the_same_numerics_come_first() -> None:
    view = view_of((0, 4), (0, 4), (0, 4), (0, 4))
    servers = [replace(one, numerics="xyzx"[at]) for at, one in enumerate(view.servers)]
    first = Stage(peer=servers[0].peer, span=Span(0, 4))
    for seed in range(5):
        found = choose_witness(
            replace(view, servers=tuple(servers)),
            first,
            frozenset({first.peer}),
            random.Random(seed),
        )
        assert found is not None
        assert found.peer == servers[3].peer


def test_micro_batches_are_neither_tiny_nor_huge() -> None:
    def tokens(total: int, longest: int = 1) -> int:
        return micro_tokens(total, longest, least=128, most=512)

    assert tokens(512) == 128
    assert tokens(2048) == 256
    assert tokens(100_000) == 512
    assert tokens(100, longest=700) == 700


def test_a_stage_is_a_stage() -> None:
    view = view_of((0, 4))
    lanes = choose_lanes(view, Span(1, 3), Experience(), random.Random(1), lanes_max=1)
    assert lanes == ((Stage(peer=view.servers[0].peer, span=Span(1, 3)),),)
