"""Cutting a span out of a model: what is read, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.base.errors import ConfigError, ModelCorrupt, ModelUnsupported
from shoal.base.spans import Span
from shoal.hf.head import load_head
from shoal.model.memory_source import MemorySource
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.span_model import SpanModel, bytes_per_block, load_span, probe_pass_through
from tests.models import NUM_BLOCKS, save_safetensors, tiny_config, tiny_model, tiny_source


class CountingSource(SafetensorsSource):
    """Counts the tensors that are read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.reads: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return super().read(name)


@pytest.fixture
def counting(tmp_path: Path) -> CountingSource:
    save_safetensors(tmp_path / "m", "llama_tied", sharded=True)
    return CountingSource(tmp_path / "m")


def test_only_the_tensors_of_the_span_are_read(counting: CountingSource) -> None:
    load_span(counting, Span(2, 4), dtype="float32")
    wanted = [n for n in counting.tensor_names() if ".layers.2." in n or ".layers.3." in n]
    assert sorted(counting.reads) == wanted


def test_the_head_reads_no_block(counting: CountingSource) -> None:
    load_head(counting)
    assert sorted(counting.reads) == ["model.embed_tokens.weight", "model.norm.weight"]


def test_weights_are_copies_that_outlive_the_file(counting: CountingSource) -> None:
    model = load_span(counting, Span(0, 1), dtype="float32")
    for path in counting.files:
        path.write_bytes(b"")
    probe_pass_through(model, "cpu")


@pytest.mark.parametrize("span", [Span(0, NUM_BLOCKS + 1), Span(3, 3), Span(90, 91)], ids=str)
def test_a_span_that_the_model_lacks_is_refused(span: Span) -> None:
    with pytest.raises(ConfigError, match="blocks"):
        load_span(tiny_source(), span, dtype="float32")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        load_span(tiny_source(), Span(0, 1), dtype="float8")


def without(name: str) -> MemorySource:
    model = tiny_model()
    tensors = model.state_dict()
    del tensors[name]
    return MemorySource(model.config, tensors)


def test_a_missing_tensor_is_named() -> None:
    source = without("model.layers.1.mlp.up_proj.weight")
    load_span(source, Span(0, 1), dtype="float32")
    with pytest.raises(ModelCorrupt, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_span(source, Span(1, 2), dtype="float32")
    with pytest.raises(ModelCorrupt, match=r"lm_head\.weight"):
        load_head(without("lm_head.weight"))


def test_a_tensor_of_another_shape_is_named() -> None:
    model = tiny_model()
    tensors = dict(model.state_dict())
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
    with pytest.raises(ModelCorrupt, match=r"up_proj.*\(3, 4\)"):
        load_span(MemorySource(model.config, tensors), Span(0, 1), dtype="float32")


def test_a_model_that_scales_its_input_fails_the_probe() -> None:
    model = load_span(tiny_source(), Span(0, 1), dtype="float32")

    class Scaling(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden * 1.01

    model.base.norm = Scaling()
    with pytest.raises(ModelUnsupported, match="cut at block borders"):
        probe_pass_through(model, "cpu")


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_per_block_counts_the_weights(dtype: str, item: int) -> None:
    expected = sum(p.numel() for p in tiny_model().model.layers[0].parameters()) * item
    assert bytes_per_block(tiny_source(), dtype) == expected


def test_blocks_outside_the_span_hold_no_memory() -> None:
    model: SpanModel = load_span(tiny_source(), Span(2, 3), dtype="bfloat16")
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert held == bytes_per_block(tiny_source(), "bfloat16")
    assert tiny_config().num_hidden_layers == NUM_BLOCKS
