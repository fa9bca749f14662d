"""Which columns of a batch are tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import BadInput
from shoal.hf.padding import RowPart, check_positions, row_parts


def parts(
    mask: Any, pads: list[int], past: int, new: int, *, kept: bool = True
) -> list[tuple[int, int]]:
    tensor = None if mask is None else torch.tensor(mask)
    found = row_parts(tensor, pads=pads, past=past, new=new, is_kept=kept)
    return [(part.start, part.end) for part in found]


@pytest.mark.parametrize(
    ("mask", "pads", "past", "new", "expected"),
    [
        (None, [0, 0], 0, 3, [(0, 3), (0, 3)]),
        (None, [2, 0], 5, 1, [(0, 1), (0, 1)]),
        ([[1, 1, 1], [0, 0, 1]], [0, 0], 0, 3, [(0, 3), (2, 3)]),
        ([[1, 1, 1, 1], [0, 0, 1, 1]], [0, 2], 3, 1, [(0, 1), (0, 1)]),
    ],
)
def test_where_tokens_are(
    mask: Any, pads: list[int], past: int, new: int, expected: list[tuple[int, int]]
) -> None:
    assert parts(mask, pads, past, new) == expected


def test_padding_at_the_end_of_rows_that_are_not_kept() -> None:
    assert parts([[1, 1, 0], [0, 1, 1]], [0, 0], 0, 3, kept=False) == [(0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("mask", "pads", "past", "message"),
    [
        ([[1, 0, 1]], [0], 0, "row 0 has a hole at column 1"),
        ([[1, 1, 1], [1, 0, 1]], [0, 0], 2, "row 1 has a hole at column 1"),
        ([[0, 0, 0]], [0], 0, "row 0 has no tokens"),
        ([[1, 1, 0]], [0], 0, "pad on the left"),
        ([[1, 1, 1]], [1], 2, "began at column 1 of the cache, but attention_mask says 0"),
        ([[1, 2, 1]], [0], 0, "only hold 0"),
        ([[1, 1]], [0], 0, r"give \(1, 3\)"),
        ([[[1, 1, 1]]], [0], 0, r"give \(1, 3\)"),
    ],
)
def test_masks_that_sessions_cannot_have(
    mask: Any, pads: list[int], past: int, message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        parts(mask, pads, past, 3 - past)


@given(
    rows=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=4),
    cut=st.integers(0, 6),
)
def test_a_prompt_and_its_continuation_hold_each_token_once(
    rows: list[tuple[int, int]], cut: int
) -> None:
    """Left-padded rows, split anywhere after everybody began: no token is lost or doubled."""
    columns = max(pad + count for pad, count in rows)
    pads = [columns - count for _, count in rows]
    first = min(max(pads) + 1 + cut, columns)
    mask = torch.tensor([[int(at >= pad) for at in range(columns)] for pad in pads])
    prompt = row_parts(mask[:, :first], pads=[0] * len(rows), past=0, new=first, is_kept=True)
    assert [part.start for part in prompt] == pads
    if first < columns:
        rest = row_parts(mask, pads=pads, past=first, new=columns - first, is_kept=True)
    else:
        rest = [RowPart(start=0, end=0)] * len(rows)
    counts = [a.count + b.count for a, b in zip(prompt, rest, strict=True)]
    assert counts == [count for _, count in rows]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    check_positions(positions[:, :first], prompt, [0] * len(rows))
    if first < columns:
        check_positions(positions[:, first:], rest, [part.count for part in prompt])


@pytest.mark.parametrize("positions", [[[0, 1]], [[1, 2, 3]], [[0, 1, 2]] * 3, [0, 1, 2]], ids=str)
def test_positions_of_ones_own_are_refused(positions: Any) -> None:
    rows = [RowPart(start=0, end=3)] * 2
    with pytest.raises(BadInput, match="position_ids"):
        check_positions(torch.tensor(positions), rows, [0, 0])
    check_positions(torch.tensor([[0, 1, 2]]), rows, [0, 0])
