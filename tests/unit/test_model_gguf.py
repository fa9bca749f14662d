"""GGUF files: the same tensors and config as the model they were made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ModelCorrupt, ModelError, ModelUnsupported
from shoal.model.gguf_header import read_gguf_header
from shoal.model.gguf_source import GgufSource
from tests.models import save_gguf

F32 = gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama3_rope", "qwen2"])
def test_float32_tensors_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    model = save_gguf(tmp_path / "m.gguf", family)
    source = GgufSource(tmp_path / "m.gguf")
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert list(source.tensor_names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
        assert source.stored(name).shape == tuple(tensor.shape)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "llama3_rope", "qwen2"])
def test_the_config_is_that_of_the_model(tmp_path: Path, family: str) -> None:
    config = save_gguf(tmp_path / "m.gguf", family).config
    ours = GgufSource(tmp_path / "m.gguf").config
    assert type(ours) is type(config)
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps rope_parameters "
        "tie_word_embeddings hidden_act"
    )
    for key in same.split():
        assert getattr(ours, key) == getattr(config, key), key
    if family != "qwen2":
        assert ours.attention_bias == config.attention_bias
        assert ours.head_dim == config.head_dim


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "F16", "BF16"])
def test_quantised_tensors_are_close(tmp_path: Path, kind: str) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    try:
        model = save_gguf(tmp_path / "m.gguf", "wide", quantisation=quantisation)
    except NotImplementedError:
        pytest.fail(f"gguf cannot write {kind}")
    source = GgufSource(tmp_path / "m.gguf")
    steps = {"Q8_0": 256, "Q4_1": 15, "Q5_0": 16, "F16": 2048, "BF16": 256}[kind]
    for name, tensor in model.state_dict().items():
        read = source.read(name)
        assert read.dtype == torch.float32
        assert (read - tensor).abs().max() <= 2 * tensor.abs().max() / steps, name
    assert source.stored("lm_head.weight").dtype == kind


def test_a_sliding_window_makes_it_mistral(tmp_path: Path) -> None:
    save_gguf(tmp_path / "m.gguf", "mistral", extra={"llama.attention.sliding_window": 9})
    config = GgufSource(tmp_path / "m.gguf").config
    assert config.model_type == "mistral"
    assert config.sliding_window == 9


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.scaling.type": "yarn"}, "yarn"),
        ({"llama.attention.value_length": 4}, "different size"),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    tmp_path: Path, extra: dict[str, int | str], named: str
) -> None:
    save_gguf(tmp_path / "m.gguf", extra=extra)
    with pytest.raises(ModelUnsupported, match=named):
        GgufSource(tmp_path / "m.gguf")


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    save_gguf(tmp_path / "m.gguf", "llama3_rope")
    place = read_gguf_header(tmp_path / "m.gguf").tensors["rope_freqs.weight"]
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    factors = np.linspace(1, 8, place.num_bytes // 4, dtype=np.float32)
    content[place.offset : place.offset + place.num_bytes] = factors.tobytes()
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelUnsupported, match="rope factors"):
        GgufSource(tmp_path / "m.gguf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("x", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelUnsupported, match=r"mamba.*llama, qwen2"):
        GgufSource(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    save_gguf(path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.005, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_corrupt(whole_file: Path, tmp_path: Path, share: float) -> None:
    content = whole_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelCorrupt):
        GgufSource(tmp_path / "cut.gguf")


@settings(max_examples=80, deadline=None)
@given(at=st.integers(4, 3000), value=st.binary(min_size=1, max_size=8))
def test_a_damaged_header_never_crashes(
    whole_file: Path, tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes
) -> None:
    content = bytearray(whole_file.read_bytes())
    content[at : at + len(value)] = value
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    path.write_bytes(content)
    try:
        GgufSource(path)
    except ModelError:
        return


def test_a_file_without_tokenizer_says_so(whole_file: Path) -> None:
    source = GgufSource(whole_file)
    assert source.eos_token_ids == ()
    with pytest.raises(ModelUnsupported, match="tokenizer"):
        source.tokenizer()
