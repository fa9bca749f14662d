"""Who sends which weights, in tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.ids import PeerId
from shoal.plan.fetching import (
    BATCH_BYTES,
    BATCH_ITEMS,
    FetchView,
    Flight,
    Wanted,
    choose_batch,
    choose_takeover,
    files_on_offer,
)

A, B, C = (PeerId(bytes([number]) * 32) for number in (1, 2, 3))
MB = 1_000_000


def wanted(name: str, size: int = MB, *, begun: bool = False) -> Wanted:
    return Wanted(content=name.encode(), left_bytes=size, is_begun=begun)


def view(*items: Wanted, **holders: str) -> FetchView:
    """`a="xy"`: peer A holds x and y."""
    peers = {"a": A, "b": B, "c": C}
    return FetchView(
        wanted=items,
        holders={
            peers[peer]: frozenset(letter.encode() for letter in names)
            for peer, names in holders.items()
        },
    )


@pytest.mark.parametrize(
    ("case", "batch"),
    [
        (view(wanted("x"), a=""), ""),
        (view(wanted("x"), b="x"), ""),
        (view(wanted("x"), wanted("y"), a="x"), "x"),
        # Rare ones first, whatever their size.
        (view(wanted("x", 9 * MB), wanted("y", 1), a="xy", b="x"), "y"),
        # Begun ones before others, then large ones first.
        (view(wanted("x", 3 * MB), wanted("y", MB, begun=True), a="xy"), "yx"),
        (view(wanted("x", 1), wanted("y", 2), wanted("z", 3), a="xyz"), "zyx"),
        # One that is larger than a batch goes alone; small ones fill a batch.
        (view(wanted("x", 99 * MB), wanted("y", 5), a="xy"), "x"),
        (view(wanted("x", 5 * MB), wanted("y", 5 * MB), wanted("z", MB), a="xyz"), "xz"),
    ],
)
def test_what_an_idle_peer_sends_next(case: FetchView, batch: str) -> None:
    assert b"".join(choose_batch(case, A)) == batch.encode()


@given(st.lists(st.integers(0, 3 * BATCH_BYTES), max_size=3 * BATCH_ITEMS), st.data())
def test_a_batch_is_bounded_and_holds_only_what_is_wanted_and_held(
    sizes: list[int], data: st.DataObject
) -> None:
    items = [
        Wanted(content=index.to_bytes(2, "big"), left_bytes=size)
        for index, size in enumerate(sizes)
    ]
    held = frozenset(one.content for one in items if data.draw(st.booleans()))
    batch = choose_batch(FetchView(wanted=tuple(items), holders={A: held}), A)
    left = {one.content: one.left_bytes for one in items}
    assert len(set(batch)) == len(batch) <= BATCH_ITEMS
    assert held.issuperset(batch)
    assert bool(batch) == bool(held)
    assert len(batch) <= 1 or sum(left[one] for one in batch) <= BATCH_BYTES


def flight(
    peer: PeerId, speed: float, left: int = 100 * MB, age_s: float = 60, names: str = "x"
) -> Flight:
    contents = tuple(name.encode() for name in names)
    return Flight(peer=peer, contents=contents, left_bytes=left, bytes_per_s=speed, age_s=age_s)


@pytest.mark.parametrize(
    ("flights", "speed", "victim"),
    [
        ([], MB, None),
        ([flight(B, MB)], 0, None),
        ([flight(B, MB)], MB, None),
        ([flight(B, MB)], 1.9 * MB, None),
        ([flight(B, MB)], 2.1 * MB, B),
        ([flight(B, 0)], MB, B),
        ([flight(B, 0, age_s=1)], MB, None),
        ([flight(B, MB, left=4 * MB)], 99 * MB, None),
        ([flight(B, MB), flight(C, MB / 2)], 99 * MB, C),
        ([flight(B, MB, names="xz")], 99 * MB, None),
        ([flight(A, 1)], 99 * MB, None),
    ],
)
def test_who_hands_its_rest_over(
    flights: list[Flight], speed: float, victim: PeerId | None
) -> None:
    case = FetchView(wanted=(), holders={A: frozenset({b"x", b"y"})}, flights=tuple(flights))
    assert choose_takeover(case, A, speed) == victim


def test_sets_of_files_with_the_most_peers_come_first() -> None:
    assert files_on_offer({A: "f", B: "g", C: "g"}) == {"g": [B, C], "f": [A]}
    assert files_on_offer({}) == {}
