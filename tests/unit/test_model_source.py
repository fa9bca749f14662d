"""Opening models: directories, shards, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.base.errors import ConfigError, ModelCorrupt, ModelUnknown, ModelUnsupported, ShoalError
from shoal.model.families import FAMILIES as SUPPORTED
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.source import open_source
from tests.models import save_gguf, save_safetensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    save_safetensors(directory)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_directory_gives_the_tensors_that_were_saved(tmp_path: Path, sharded: bool) -> None:
    model = save_safetensors(tmp_path / "model", sharded=sharded)
    source = open_source(tmp_path / "model", tmp_path)
    assert (len(source.files) > 2) == sharded
    expected = model.state_dict()
    assert list(source.tensor_names()) == sorted(expected)
    for name in source.tensor_names():
        assert torch.equal(source.read(name), expected[name])
        assert source.stored(name).shape == tuple(expected[name].shape)
        assert source.stored(name).dtype == "F32"
    assert source.config.model_type == "llama"


def test_tied_heads_are_stored_once(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model", "llama_tied")
    source = open_source(tmp_path / "model", tmp_path)
    assert "lm_head.weight" not in source.tensor_names()


def test_end_tokens_come_from_the_generation_config_first(saved: Path) -> None:
    assert SafetensorsSource(saved).eos_token_ids == ()
    edit_json(saved / "config.json", eos_token_id=4)
    (saved / "generation_config.json").unlink()
    assert SafetensorsSource(saved).eos_token_ids == (4,)
    (saved / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert SafetensorsSource(saved).eos_token_ids == (5, 6)


def refused(model: Path | str, kind: type[ShoalError], tmp_path: Path) -> str:
    with pytest.raises(kind) as caught:
        open_source(model, tmp_path / "cache")
    return caught.value.detail


def test_an_unknown_name_lists_what_a_model_can_be(tmp_path: Path) -> None:
    detail = refused("gpt-17", ModelUnknown, tmp_path)
    assert "smollm2-135m-instruct" in detail
    assert ".gguf" in detail


def test_a_known_name_that_was_not_fetched_says_how(tmp_path: Path) -> None:
    detail = refused("smollm2-135m-instruct", ModelUnknown, tmp_path)
    assert "shoal model get smollm2-135m-instruct" in detail


def test_a_directory_without_config_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refused(tmp_path, ModelUnknown, tmp_path)


def test_pickled_weights_are_refused_with_the_reason(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    assert "runs code" in refused(saved, ModelUnsupported, tmp_path)
    assert "runs code" in refused(saved / "pytorch_model.bin", ModelUnsupported, tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_part_of_a_model_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    refused(saved / name, ModelUnsupported, tmp_path)


def test_another_architecture_is_refused_with_the_supported_ones(
    saved: Path, tmp_path: Path
) -> None:
    edit_json(saved / "config.json", model_type="t5", architectures=["T5Model"])
    detail = refused(saved, ModelUnsupported, tmp_path)
    for family in SUPPORTED:
        assert family in detail


def test_an_architecture_transformers_does_not_know_is_refused(saved: Path, tmp_path: Path) -> None:
    edit_json(saved / "config.json", model_type="no-such-thing")
    refused(saved, ModelUnsupported, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_corrupt(saved: Path, tmp_path: Path, kept: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "truncated" in refused(saved, ModelCorrupt, tmp_path)


def test_a_damaged_header_is_corrupt(saved: Path, tmp_path: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[9:20] = b"\xff" * 11
    path.write_bytes(content)
    refused(saved, ModelCorrupt, tmp_path)


def test_missing_weights_are_corrupt(saved: Path, tmp_path: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert "safetensors" in refused(saved, ModelCorrupt, tmp_path)


def test_a_broken_config_is_corrupt(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").write_text("{")
    refused(saved, ModelCorrupt, tmp_path)
    (saved / "config.json").write_text("[]")
    refused(saved, ModelCorrupt, tmp_path)


def test_a_missing_shard_is_corrupt(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_safetensors(directory, sharded=True)
    sorted(directory.glob("*.safetensors"))[1].unlink()
    assert "missing" in refused(directory, ModelCorrupt, tmp_path)


@pytest.mark.parametrize("weight_map", [{}, {"x": "../x.safetensors"}, {"x": 3}])
def test_a_hostile_index_is_corrupt(tmp_path: Path, weight_map: dict[str, Any]) -> None:
    directory = tmp_path / "model"
    save_safetensors(directory, sharded=True)
    edit_json(directory / "model.safetensors.index.json", weight_map=weight_map)
    refused(directory, ModelCorrupt, tmp_path)


def test_an_index_that_promises_too_much_is_corrupt(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_safetensors(directory, sharded=True)
    index = directory / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"more": next(iter(weight_map.values()))})
    assert "lacks more" in refused(directory, ModelCorrupt, tmp_path)


def test_a_directory_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    save_gguf(tmp_path / "a.gguf")
    assert open_source(tmp_path, tmp_path).files == (tmp_path / "a.gguf",)
    save_gguf(tmp_path / "b.gguf")
    assert "a.gguf" in refused(tmp_path, ConfigError, tmp_path)


def test_a_directory_without_tokenizer_says_so(saved: Path) -> None:
    with pytest.raises(ModelUnsupported, match="tokenizer"):
        SafetensorsSource(saved).tokenizer()
