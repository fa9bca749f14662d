"""The KV cache of packed passes: sliding blocks stay small and never show a wrong row."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import InternalError
from shoal.base.spans import Span
from shoal.model.block_rows import (
    PAGE_TOKENS,
    ROLLBACK_TOKENS,
    BlockRows,
    first_visible,
    kept_tokens,
)
from shoal.model.packed_cache import PackedCache

WINDOWS = (None, 5, 40, 1)
SPAN = Span(0, len(WINDOWS))
HEADS, SIZE = 2, 3


def rows_of(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that can be told apart: each row holds its number."""
    keys = torch.tensor(numbers, dtype=torch.float64).reshape(1, 1, -1, 1)
    keys = keys.expand(1, HEADS, -1, SIZE)
    return keys, keys + 0.5


@dataclass
class Pair:
    """A cache beside a list that forgets nothing."""

    cache: PackedCache = field(default_factory=lambda: PackedCache(WINDOWS, SPAN))
    numbers: list[int] = field(default_factory=list)
    longest: int = 0
    """The longest it was since it was last empty: margins count from there."""

    def write(self, numbers: list[int], *, is_committed: bool = True) -> None:
        """A pass of two calls; a failed one leaves its rows uncommitted."""
        start = len(self.numbers)
        half = len(numbers) // 2
        written = [*self.numbers, *numbers]
        for block in range(len(WINDOWS)):
            for part, at in ((numbers[:half], start), (numbers[half:], start + half)):
                if part:
                    self.cache.write(block, at, *rows_of(part))
            self.check_reads(block, written[: start + half], start)
            self.check_reads(block, written, start + half)
        if is_committed:
            self.numbers += numbers
            self.cache.commit(len(self.numbers))
            self.longest = max(self.longest, len(self.numbers))

    def check_reads(self, block: int, numbers: list[int], start: int) -> None:
        """What attention sees from `start` on is what was written there last."""
        first = first_visible(start, WINDOWS[block])
        if first == len(numbers):
            return
        keys, values = self.cache.read(block, first, len(numbers))
        expected, expected_values = rows_of(numbers[first:])
        assert torch.equal(keys, expected)
        assert torch.equal(values, expected_values)

    def cut(self, length: int) -> None:
        actual = self.cache.truncate(length)
        self.check_reached(actual, length)
        del self.numbers[actual:]
        assert self.cache.length == actual
        if not actual:
            self.longest = 0

    def forked(self, length: int) -> Pair:
        child = Pair(self.cache.forked(length))
        self.check_reached(child.cache.length, length)
        child.numbers = self.numbers[: child.cache.length]
        child.longest = self.longest if child.numbers else 0
        return child

    def check_reached(self, actual: int, length: int) -> None:
        wanted = max(min(length, len(self.numbers)), 0)
        assert actual in (0, wanted)
        if wanted >= self.longest - ROLLBACK_TOKENS:
            assert actual == wanted


steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "write", "fail"]), st.integers(1, 150)),
        st.tuples(st.just("decode"), st.integers(1, 60)),
        st.tuples(st.sampled_from(["back", "fork back"]), st.integers(0, ROLLBACK_TOKENS + 40)),
        st.tuples(st.just("cut"), st.integers(0, 300)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_reads_are_those_of_a_cache_that_forgets_nothing(steps: list[tuple[str, int]]) -> None:
    pair, parents = Pair(), []
    number = 0
    for what, count in steps:
        new = list(range(number, number + count))
        number += count
        match what:
            case "write":
                pair.write(new)
            case "fail":
                pair.write(new, is_committed=False)
            case "decode":
                for one in new:
                    pair.write([one])
            case "cut":
                pair.cut(count)
            case "back":
                pair.cut(len(pair.numbers) - count)
            case "fork back":
                parents.append(pair)
                pair = pair.forked(len(pair.numbers) - count)
    for parent in [*parents, pair]:
        parent.write([-1])


def test_a_sliding_block_stops_growing() -> None:
    window = 50
    cache = PackedCache((window,), Span(0, 1))
    sizes: list[int] = []
    for position in range(10 * window):
        cache.write(0, position, *rows_of([position]))
        cache.commit(position + 1)
        sizes.append(cache.num_bytes)
        reachable = max(position + 1 - ROLLBACK_TOKENS, 0)
        assert cache.forked(reachable).length == reachable
    row_bytes = 2 * HEADS * SIZE * 8
    assert max(sizes) <= row_bytes * (kept_tokens(window) * 5 // 4 + 2 * PAGE_TOKENS)
    assert len(set(sizes[5 * window :])) == 1
    assert cache.truncate(10 * window - ROLLBACK_TOKENS) == 10 * window - ROLLBACK_TOKENS
    assert cache.truncate(window) == 0
    assert cache.num_bytes == 0


@pytest.mark.parametrize("chunk", [7, 64, 200])
def test_chunks_add_at_most_themselves(chunk: int) -> None:
    window = 50
    sliding, full = PackedCache((window,), Span(0, 1)), PackedCache((None,), Span(0, 1))
    for start in range(0, 2000, chunk):
        for cache in (sliding, full):
            cache.write(0, start, *rows_of(list(range(start, start + chunk))))
            cache.commit(start + chunk)
    row_bytes = 2 * HEADS * SIZE * 8
    bound = kept_tokens(window) * 5 // 4 + 2 * PAGE_TOKENS + chunk
    assert sliding.num_bytes <= row_bytes * bound
    assert full.num_bytes >= row_bytes * full.length
    assert sliding.forked(sliding.length).num_bytes <= row_bytes * (bound - chunk)
    # The next decode step gives back what only the chunk needed.
    for _ in range(PAGE_TOKENS):
        sliding.write(0, sliding.length, *rows_of([0]))
        sliding.commit(sliding.length + 1)
    assert sliding.num_bytes <= row_bytes * (bound - chunk)


@pytest.mark.parametrize("window", [None, 1, 16, 500])
def test_copying_stays_rare(window: int | None) -> None:
    rows = BlockRows(window)
    copied, held = 0, 0
    for position in range(3000):
        one = rows_of([position])
        before = rows.read(position - 1, position)[0].data_ptr() if position else 0
        rows.write(position, *one, position)
        assert rows.first % PAGE_TOKENS == 0
        if position and rows.read(position - 1, position)[0].data_ptr() != before:
            copied += position - rows.first
            held = max(held, rows.capacity)
    # A copy of all that is held every quarter of it: five rows for each new one, at most.
    assert copied <= 5 * 3000 + held


def test_what_is_not_held_cannot_be_read() -> None:
    rows = BlockRows(4)
    with pytest.raises(InternalError, match="0 to 1"):
        rows.read(0, 1)
    for position in range(400):
        rows.write(position, *rows_of([position]), position)
    assert rows.first > 0
    with pytest.raises(InternalError, match=f"positions {rows.first - 1} to 400"):
        rows.read(rows.first - 1, 400)
    with pytest.raises(InternalError, match="positions 399 to 1000"):
        rows.read(399, 1000)
