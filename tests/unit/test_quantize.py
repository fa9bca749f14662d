"""Quantised linear layers and blocks: error, equal results by both ways, size, refusals."""

from __future__ import annotations

import pytest
import torch

from shoal.base.errors import ConfigError, ModelUnsupported
from shoal.base.spans import Span
from shoal.model.numerics import numerics_class
from shoal.model.quantize import Quantization, check_quantize, quantized_bytes, quantized_linear
from shoal.model.quantized_linear import (
    INT4_PACKED_ROWS_MAX,
    INT8_PACKED_ROWS_MAX,
    Int4Linear,
    Int8Linear,
    cancelling_copy,
    packed_layout,
)
from shoal.model.span_model import bytes_per_block, load_span
from tests.models import tiny_source
from tests.quantized_cases import ERROR_MAX, rms_error, wide_source

KINDS: tuple[Quantization, ...] = ("int8", "int4")
ROWS_MAX = {"int8": INT8_PACKED_ROWS_MAX, "int4": INT4_PACKED_ROWS_MAX}


def linear(inputs: int, outputs: int, bias: bool = False) -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"), [(64, 64, False), (96, 33, True), (576, 192, False)]
)
@torch.inference_mode()
def test_a_layer_stays_close_for_few_and_many_rows(
    kind: Quantization, inputs: int, outputs: int, bias: bool
) -> None:
    layer = linear(inputs, outputs, bias)
    quantized = quantized_linear(layer, kind, "cpu")
    for rows in (1, 7, ROWS_MAX[kind], ROWS_MAX[kind] + 1):
        hidden = torch.randn(2, rows, inputs)[:, : rows // 2 + 1]
        result = quantized(hidden)
        assert result.dtype == torch.float32
        assert result.shape == (*hidden.shape[:-1], outputs)
        assert rms_error(result, layer(hidden)) < ERROR_MAX[kind]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_both_ways_compute_with_the_same_weights(kind: Quantization) -> None:
    layer = quantized_linear(linear(128, 192), kind, "cpu")
    assert isinstance(layer, Int8Linear | Int4Linear)
    hidden = torch.randn(ROWS_MAX[kind] + 1, 128)
    expected = hidden @ layer.dequantized().T
    many, few = layer(hidden), torch.cat([layer(row) for row in hidden.split(5)])
    # Only rounding to bfloat16 (of rows, results and unfolded weights) is between them.
    assert rms_error(many, expected) < 0.006
    assert rms_error(few, expected) < 0.006


@torch.inference_mode()
def test_int8_keeps_weights_within_half_a_step() -> None:
    layer = linear(64, 48)
    step = layer.weight.abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-7)
    assert bool(((Int8Linear(layer).dequantized() - layer.weight).abs() <= step / 2).all())


@torch.inference_mode()
def test_int4_keeps_weights_within_a_step() -> None:
    layer = linear(64, 48)
    groups = layer.weight.view(48, 1, 64)
    step = ((groups.amax(2) - groups.amin(2)) / 15).expand(48, 64)
    assert bool(((Int4Linear(layer).dequantized() - layer.weight).abs() <= step).all())


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_row_of_zeros_stays_zero(kind: Quantization) -> None:
    layer = linear(64, 64)
    layer.weight[5] = 0
    result = quantized_linear(layer, kind, "cpu")(torch.randn(3, 64))
    assert bool(torch.isfinite(result).all())
    assert float(result[:, 5].abs().max()) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_span_holds_what_bytes_per_block_says(kind: Quantization, dtype: str) -> None:
    source = wide_source()
    model = load_span(source, Span(1, 2), dtype=dtype, quantize=kind)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held == bytes_per_block(source, dtype, kind)
    assert held < bytes_per_block(source, "bfloat16") * (0.6 if kind == "int8" else 0.4)


def test_numerics_class_names_the_quantisation() -> None:
    config = wide_source().config
    classes = {kind: numerics_class(config, "bfloat16", "cpu", kind) for kind in KINDS}
    assert classes["int8"].startswith("bfloat16+int8-")
    assert classes["int4"].startswith("bfloat16+int4-")
    assert numerics_class(config, "bfloat16", "cpu") not in classes.values()
    assert numerics_class(config, "bfloat16", "cpu", "int8") == classes["int8"]


def test_int4_refuses_widths_that_no_group_divides() -> None:
    with pytest.raises(ModelUnsupported, match="48: use int8"):
        load_span(tiny_source(), Span(0, 1), dtype="float32", quantize="int4")


def test_blocks_of_experts_are_refused() -> None:
    with pytest.raises(ModelUnsupported, match="experts"):
        load_span(tiny_source("mixtral"), Span(0, 1), dtype="float32", quantize="int8")


def test_unknown_kinds_and_missing_extras_name_the_fix() -> None:
    with pytest.raises(ConfigError, match="none, int8, int4"):
        check_quantize("int5", "cpu")
    check_quantize("int8", "cpu")
    check_quantize("none", "cuda")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"shoal\[bitsandbytes\]"):
            check_quantize("int8", "cuda:0")


def test_the_packed_layout_is_known_here() -> None:
    layout = packed_layout()
    assert layout.width in (16, 32, 64)


def test_meta_blocks_can_be_sized() -> None:
    with torch.device("meta"):
        block = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    assert quantized_bytes(block, "int8") == 64 * 64 + 2 * 64
    assert quantized_bytes(block, "none") == 4 * 64 * 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 192), (576, 1536), (1536, 576)])
@torch.inference_mode()
def test_company_changes_no_bit_of_the_packed_kernels(
    kind: Quantization, inputs: int, outputs: int
) -> None:
    """Exact results are zero: what is compared is the order of the sums itself."""
    layer = quantized_linear(linear(inputs, outputs), kind, "cpu")
    assert isinstance(layer, Int8Linear | Int4Linear)
    generator = torch.Generator().manual_seed(4)
    probe, rows = cancelling_copy(layer, ROWS_MAX[kind], generator)
    together = probe(rows)
    assert 0 < float(together.abs().max()) < 1e-3
    for count in range(1, ROWS_MAX[kind] + 1):
        order = torch.randperm(count, generator=generator)
        assert torch.equal(probe(rows[order]), together[order])
