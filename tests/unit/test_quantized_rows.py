"""The compressed encoding of hidden states: size, error, independence of rows, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import BadInput
from shoal.model.quantized_rows import BLOCK_VALUES, INT8_BLOCK
from shoal.model.rows import all_finite, encodings_for, rows_from_bytes, rows_to_bytes
from shoal.wire import tensors as wire

SIZES = st.tuples(st.integers(1, 5), st.integers(1, 200))


def random_rows(count: int, hidden_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * count + hidden_size)
    rows = torch.randn(count, hidden_size, generator=generator)
    return rows * torch.randint(1, 50, (1, hidden_size), generator=generator)


def test_both_sides_of_the_torch_border_know_the_same_encoding() -> None:
    assert (INT8_BLOCK, BLOCK_VALUES) == (wire.INT8_BLOCK, wire.BLOCK_VALUES)
    assert encodings_for("bfloat16")[0] == "bfloat16"
    assert encodings_for("bfloat16")[-1] == INT8_BLOCK


@given(SIZES)
def test_rows_come_back_within_half_a_step_of_their_block(shape: tuple[int, int]) -> None:
    rows = random_rows(*shape)
    data = rows_to_bytes(rows, INT8_BLOCK)
    assert len(data) == shape[0] * wire.row_bytes(INT8_BLOCK, shape[1])
    back = rows_from_bytes(data, INT8_BLOCK, *shape)
    for mine, theirs in zip(
        rows.split(BLOCK_VALUES, dim=1), back.split(BLOCK_VALUES, dim=1), strict=True
    ):
        step = mine.abs().amax(dim=1, keepdim=True) / 127
        # The scale itself is rounded up to float16: at most 2**-10 more.
        assert bool(((mine - theirs).abs() <= 0.501 * step + 1e-7).all())


@given(SIZES)
def test_a_row_has_the_same_bytes_in_any_company(shape: tuple[int, int]) -> None:
    rows = random_rows(*shape)
    alone = b"".join(rows_to_bytes(row.unsqueeze(0), INT8_BLOCK) for row in rows)
    assert rows_to_bytes(rows, INT8_BLOCK) == alone


def test_encoding_decoded_rows_again_changes_nothing() -> None:
    once = rows_to_bytes(random_rows(3, 130), INT8_BLOCK)
    assert rows_to_bytes(rows_from_bytes(once, INT8_BLOCK, 3, 130), INT8_BLOCK) == once


def test_an_outlier_spoils_only_its_block() -> None:
    rows = random_rows(1, 192) / 50
    rows[0, 70] = 5000.0
    back = rows_from_bytes(rows_to_bytes(rows, INT8_BLOCK), INT8_BLOCK, 1, 192)
    assert float((rows - back)[0, :64].abs().max()) < 0.02
    assert float((rows - back)[0, 128:].abs().max()) < 0.02
    assert abs(float(back[0, 70]) - 5000) < 5


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e-5, 1e6])
def test_small_and_large_values(value: float) -> None:
    rows = torch.full((2, 64), value)
    back = rows_from_bytes(rows_to_bytes(rows, INT8_BLOCK), INT8_BLOCK, 2, 64)
    assert float((rows - back).abs().max()) <= max(0.01 * value, 1e-7)


@pytest.mark.parametrize("value", [1e9, float("inf"), float("nan")])
def test_values_that_no_scale_reaches_are_refused(value: float) -> None:
    with pytest.raises(BadInput, match="too large"):
        rows_to_bytes(torch.full((1, 64), value), INT8_BLOCK)


def test_wrong_sizes_are_refused_and_bad_scales_are_seen() -> None:
    with pytest.raises(BadInput, match="are 132 bytes, got 131"):
        rows_from_bytes(bytes(131), INT8_BLOCK, 2, 64)
    data = bytearray(rows_to_bytes(torch.ones(1, 64), INT8_BLOCK))
    data[-2:] = b"\xff\xff"  # a float16 NaN
    assert not all_finite(rows_from_bytes(data, INT8_BLOCK, 1, 64))
    with pytest.raises(BadInput, match="int8-block"):
        rows_from_bytes(b"", "zip", 1, 64)
