"""The algebra of spans agrees with sets of blocks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.spans import Span, missing_blocks, parse_span

BLOCKS = 12


@st.composite
def any_span(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, BLOCKS))
    return Span(start, draw(st.integers(start, BLOCKS)))


def blocks(*spans: Span) -> set[int]:
    return {block for span in spans for block in range(span.start, span.end)}


@given(any_span(), st.integers(-1, BLOCKS + 1))
def test_length_and_membership(span: Span, block: int) -> None:
    assert len(span) == len(blocks(span))
    assert (block in span) == (block in blocks(span))
    assert "0" not in span


@given(any_span(), any_span())
def test_overlap_and_cover(one: Span, two: Span) -> None:
    overlap = one.overlap(two)
    assert (blocks(overlap) if overlap else set()) == blocks(one) & blocks(two)
    assert overlap is None or len(overlap)
    if len(two):
        assert one.covers(two) == (blocks(two) <= blocks(one))


def test_a_border_is_covered_where_it_lies() -> None:
    assert Span(2, 4).covers(Span(4, 4))
    assert not Span(2, 4).covers(Span(5, 5))


@given(any_span(), st.lists(any_span(), max_size=6))
def test_missing_blocks_are_exactly_the_uncovered_ones(wanted: Span, held: list[Span]) -> None:
    missing = missing_blocks(wanted, held)
    assert blocks(*missing) == blocks(wanted) - blocks(*held)
    assert all(len(hole) for hole in missing)
    for before, after in itertools.pairwise(missing):
        assert before.end < after.start, "in order, and as long as they can be"


@given(any_span().filter(len))
def test_a_span_reads_back_as_it_is_written(span: Span) -> None:
    assert (
        parse_span(f"{span.start}:{span.end}") == parse_span(f" {span.start} : {span.end} ") == span
    )


@pytest.mark.parametrize(
    "text", ["", "1", "1:", ":2", "a:b", "-1:2", "1:2:3", "1-2", "3:3", "4:2", "1.0:2"]
)
def test_bad_texts_say_what_to_write(text: str) -> None:
    with pytest.raises(ConfigError, match="START"):
        parse_span(text)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (-3, -2)])
def test_what_is_no_span(start: int, end: int) -> None:
    with pytest.raises(ValueError, match="not a span"):
        Span(start, end)


def test_spans_are_ordered_shown_and_hashed() -> None:
    assert sorted([Span(3, 4), Span(0, 9), Span(0, 2)]) == [Span(0, 2), Span(0, 9), Span(3, 4)]
    assert str(Span(12, 20)) == "[12,20)"
    assert len({Span(0, 1), Span(0, 1)}) == 1
