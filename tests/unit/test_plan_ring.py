"""Who hosts which blocks of a ring, and what changes when a node is lost or slow."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.ring import NodeSpec, RingModel, head_s, split_by_hand, split_ring
from shoal.plan.ring_repair import NodeView, after_loss, better_split
from shoal.plan.spec import DecodeTimes

MIB = 1 << 20


def model_of(blocks=12, weight=10 * MIB, cache_tokens=0):
    return RingModel(
        weight_bytes=(weight,) * blocks, token_bytes=(1024,) * blocks, head_bytes=20 * MIB,
        row_bytes=512, cache_tokens=cache_tokens,
    )  # fmt: skip


def node(number, s=0.01, memory=1 << 30, **more):
    return NodeSpec(
        peer=PeerId(bytes([number]) * 32), name=f"node{number}", memory_bytes=memory,
        decode=DecodeTimes(points=((1, s),)), **more,
    )  # fmt: skip


def counts(split):
    return [len(span) if span else 0 for span in split.spans]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node(1)], [12]),
        ([node(1), node(2), node(3)], [4, 4, 4]),
        ([node(1), node(2, s=0.02), node(3)], [5, 2, 5]),
        ([node(1), node(2, memory=22 * MIB)], [10, 2]),
        ([node(1, fixed_s=0.03), node(2)], [4, 8]),
        ([node(1, fixed_s=0.03, num_blocks=0), node(2), node(3)], [0, 6, 6]),
        ([node(1), node(2, num_blocks=1), node(3)], [5, 1, 6]),
        ([node(1), node(2, s=1.0)], [12, 0]),
    ],
)
def test_the_slowest_stage_is_as_quick_as_memory_allows(nodes, expected):
    split = split_ring(model_of(), nodes)
    assert sorted(counts(split)) == sorted(expected)
    assert counts(split)[0] == expected[0] or len(nodes) == 3
    assert split.spans[-1] is None or split.spans[-1].end == 12


@given(
    blocks=st.integers(1, 9),
    speeds=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=3),
    data=st.data(),
)
def test_no_other_split_is_quicker(blocks, speeds, data):
    model = model_of(blocks)
    memory = st.integers(0, blocks + 1).map(lambda count: count * 11 * MIB)
    nodes = [node(i, s=s, memory=data.draw(memory)) for i, s in enumerate(speeds, 1)]
    best = float("inf")
    for one in itertools.product(range(blocks + 1), repeat=len(nodes)):
        if sum(one) != blocks:
            continue
        start, fits = 0, True
        for spec, count in zip(nodes, one, strict=True):
            fits &= model.need_bytes(Span(start, start + count)) <= spec.memory_bytes
            start += count
        if fits:
            slowest = max(s.stage_s(c, 1.0) for s, c in zip(nodes, one, strict=True))
            best = min(best, slowest)
    if best == float("inf"):
        with pytest.raises(ConfigError, match="can't hold the model"):
            split_ring(model, nodes)
        return
    split = split_ring(model, nodes)
    assert split.slowest_s == pytest.approx(best)
    assert sum(counts(split)) == blocks


def test_a_ring_that_is_too_small_names_the_numbers():
    with pytest.raises(ConfigError) as caught:
        split_ring(model_of(cache_tokens=1024), [node(1, memory=50 * MIB), node(2, memory=MIB)])
    for text in ("12 blocks", "132 MiB", "1024 positions", "node1 50 MiB", "node2 1 MiB"):
        assert text in caught.value.detail


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((6, 6, 0), "3 numbers for 2 nodes"),
        ((6, 5), "11 blocks in all; this model has 12"),
        ((-1, 13), "12 blocks in all"),
        ((3, 9), r"node2 would need 90 MiB for blocks \[3,12\)"),
    ],
)
def test_a_split_by_hand_is_checked(wanted, message):
    with pytest.raises(ConfigError, match=message):
        split_by_hand(model_of(), [node(1), node(2, memory=64 * MIB)], wanted)


def test_a_split_by_hand():
    assert split_by_hand(model_of(), [node(1), node(2)], (2, 10)).spans == (Span(0, 2), Span(2, 12))


def test_head_costs_as_much_as_its_weights():
    assert head_s(model_of(), DecodeTimes(points=((1, 0.01),))) == pytest.approx(0.02)


def view(number, start, end, *, free=0, pace=0.0, **more):
    span = Span(start, end) if end > start else None
    return NodeView(spec=node(number, **more), span=span, free_bytes=free, pace_s=pace)


def changes(tasks):
    return {task.peer[0]: (task.span and (task.span.start, task.span.end)) for task in tasks}


def test_nothing_is_lost():
    assert after_loss(model_of(), [view(1, 0, 6), view(2, 6, 12), view(3, 0, 0)]) == ()


def test_a_spare_takes_a_lost_nodes_blocks():
    nodes = [view(1, 0, 4), view(3, 8, 12), view(4, 0, 0, s=0.02), view(5, 0, 0)]
    tasks = after_loss(model_of(), nodes)
    assert changes(tasks) == {5: (4, 8)}
    assert tasks[0].is_beside


def test_a_spare_without_room_is_no_help_alone():
    nodes = [view(1, 0, 4), view(3, 8, 12), view(4, 0, 0, memory=11 * MIB)]
    assert changes(after_loss(model_of(), nodes)) == {1: (0, 6), 3: (6, 12)}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([view(1, 0, 4), view(3, 8, 12)], {1: (0, 6), 3: (6, 12)}),
        ([view(2, 4, 8), view(3, 8, 12)], {2: (0, 8)}),  # the other keeps what it has
        ([view(1, 0, 4), view(2, 4, 8, memory=42 * MIB)], {2: (8, 12), 1: (0, 8)}),
    ],
)
def test_the_living_take_lost_blocks_over(nodes, expected):
    assert changes(after_loss(model_of(), nodes)) == expected


def test_who_has_room_loads_beside_what_it_serves():
    tasks = after_loss(model_of(), [view(1, 0, 4, free=2 << 30), view(3, 8, 12, free=MIB)])
    assert {task.peer[0]: task.is_beside for task in tasks} == {1: True, 3: False}


def test_who_keeps_its_blocks_needs_room_for_the_new_ones_only():
    nodes = [view(1, 0, 4, free=25 * MIB), view(3, 8, 12, free=15 * MIB)]
    assert not any(task.is_beside for task in after_loss(model_of(), nodes))
    keeping = replace(model_of(), keeps_blocks=True, spare_bytes=4 * MIB)
    tasks = after_loss(keeping, nodes)
    assert changes(tasks) == {1: (0, 6), 3: (6, 12)}
    assert {task.peer[0]: task.is_beside for task in tasks} == {1: True, 3: False}
    assert keeping.need_bytes(Span(0, 6), Span(0, 4)) == 24 * MIB
    assert keeping.need_bytes(Span(0, 6)) == 64 * MIB


def test_too_few_are_left():
    with pytest.raises(ConfigError, match="can't hold the model"):
        after_loss(model_of(), [view(1, 0, 4, memory=50 * MIB)])


@pytest.mark.parametrize(
    ("paces", "expected"),
    [
        ((0.01, 0.01), None),
        ((0.011, 0.01), None),
        ((0.03, 0.01), (3, 9)),
        ((0.0, 0.01), None),
    ],
)
def test_a_new_split_is_proposed_when_it_is_worth_it(paces, expected):
    found = better_split(model_of(), [view(1, 0, 6, pace=paces[0]), view(2, 6, 12, pace=paces[1])])
    assert (None if found is None else tuple(counts(found[0]))) == expected
