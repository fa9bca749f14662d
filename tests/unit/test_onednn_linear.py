"""Linear layers in oneDNN's layout compute what plain ones do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional

from shoal.base.spans import Span
from shoal.model.onednn_linear import OneDnnLinear, packed_linear, use_onednn
from shoal.model.packed_model import PackedModel
from shoal.model.rows import rows_from_bytes
from shoal.model.span_model import load_span
from tests.unit.exact_cases import Step, backend, play, rows_at, source

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(3)
    layer = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    for weight in layer.parameters():
        weight.requires_grad_(False).copy_(torch.randn(weight.shape, generator=generator))
    return layer


@torch.inference_mode()
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (33,), (1, 1), (1, 5), (2, 3, 4)])
def test_the_product_is_that_of_a_plain_layer(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    plain = linear(256, 320, dtype, bias)
    rows = torch.randn((*shape, 256), generator=torch.Generator().manual_seed(4)).to(dtype)
    block = torch.nn.Sequential(plain)
    use_onednn(block)
    assert isinstance(block[0], OneDnnLinear)
    ours, theirs = block(rows), functional.linear(rows, plain.weight, plain.bias)
    assert ours.shape == theirs.shape
    assert ours.dtype == dtype
    assert (ours - theirs).abs().max() <= TOLERANCES[dtype] * theirs.abs().max()
    strided = block(rows.repeat_interleave(2, dim=-1)[..., ::2])
    assert torch.equal(strided, ours)


def test_small_layers_and_other_kinds_stay() -> None:
    block = torch.nn.Sequential(
        linear(64, 64, torch.float32),
        linear(256, 256, torch.float16),
        torch.nn.Linear(256, 256, device="meta"),
        torch.nn.Embedding(256, 256),
    )
    before = list(block)
    use_onednn(block)
    assert list(block) == before


def test_the_plain_weights_are_given_back() -> None:
    model = load_span(source("llama-wide"), Span(0, 2), dtype="float32")
    plain = weakref.ref(model.block(0).get_parameter("mlp.up_proj.weight"))
    norms = sum(weight.dim() == 1 for weight in model.parameters())
    packed = PackedModel(model)
    gc.collect()
    assert plain() is None
    assert packed.kernels == "onednn"
    assert packed.block_kinds() == [0]
    # Keys and values are narrow enough to stay as they are.
    assert len(model.parameters()) == norms + 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_computes_what_it_did(dtype: str) -> None:
    steps = [Step(24, 24), Step(1, 1), Step(9, 9), Step(1, 1)]
    target = backend("llama-wide", dtype)
    assert target._model.kernels == "onednn"
    ours, _ = play(target, steps)
    model = load_span(source("llama-wide"), target.facts.span, dtype=dtype)
    cache = model.new_cache(model.span)
    outputs = []
    with torch.inference_mode():
        for step in steps:
            rows = rows_at(1, cache.length, step.count, target.facts.hidden_size)
            given = rows_from_bytes(rows, "float32", step.count, target.facts.hidden_size)
            outputs.append(model.forward(given.to(model.dtype), cache.length, cache, model.span))
            cache.commit(step.count)
    mine = torch.frombuffer(bytearray(ours), dtype=model.dtype).float()
    other = torch.cat(outputs).flatten().float()
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert (mine - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16, torch.float32])
def test_another_dtype_is_asked_for_later(dtype: torch.dtype) -> None:
    """Where oneDNN does not take it the weights are plain again."""
    plain = linear(256, 320, torch.float32, bias=True)
    packed = packed_linear(linear(256, 320, torch.float32, bias=True))
    packed.keep_transposed()
    rows = torch.randn((3, 256), generator=torch.Generator().manual_seed(4)).to(dtype)
    rows.requires_grad_()
    ours, theirs = packed.to(dtype)(rows), plain.to(dtype)(rows)
    assert ours.dtype == dtype
    gradients = [torch.autograd.grad(one.sum(), rows)[0] for one in (ours, theirs)]
    close = 1e-5 if dtype in (torch.float32, torch.float64) else 2e-2
    for mine, other in ((ours, theirs), gradients):
        assert (mine - other).abs().max() <= close * other.abs().max()
