"""A model's name: what it depends on, what it doesn't, and how little is hashed twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.base.errors import ModelCorrupt
from shoal.model.manifest import build_manifest, check_tensors, model_hash
from shoal.model.memory_source import MemorySource
from shoal.model.safetensors_source import SafetensorsSource
from tests.models import save_gguf, save_safetensors, tiny_model, tiny_source


class CountingSource(SafetensorsSource):
    """Counts the tensors that are hashed."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.hashed: list[str] = []

    def stored_bytes(self, name: str) -> Iterator[memoryview]:
        self.hashed.append(name)
        return super().stored_bytes(name)


def test_the_name_is_the_same_wherever_the_files_lie_and_however_they_are_cut(
    tmp_path: Path,
) -> None:
    save_safetensors(tmp_path / "a")
    save_safetensors(tmp_path / "b", sharded=True)
    config = tmp_path / "b" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"transformers_version": "9"}))
    names = {model_hash(SafetensorsSource(tmp_path / part)) for part in "ab"}
    assert len(names) == 1
    (name,) = names
    assert len(name) == 32
    assert int(name, 16)


def altered(name: str) -> MemorySource:
    """The tiny model with one other value in the tensor `name`."""
    model = tiny_model()
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors[name][0] += 1
    return MemorySource(model.config, tensors)


def test_one_other_value_is_another_model() -> None:
    before = model_hash(tiny_source())
    assert model_hash(tiny_source()) == before
    assert model_hash(altered("model.norm.weight")) != before


def test_another_config_is_another_model(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a")
    before = model_hash(SafetensorsSource(tmp_path / "a"))
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    assert model_hash(SafetensorsSource(tmp_path / "a")) != before


def test_weights_are_hashed_once_per_machine(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a")
    first = CountingSource(tmp_path / "a")
    name = model_hash(first, tmp_path / "cache")
    assert sorted(first.hashed) == sorted(first.tensor_names())
    second = CountingSource(tmp_path / "a")
    assert model_hash(second, tmp_path / "cache") == name
    assert second.hashed == []


def test_changed_files_are_hashed_again(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a")
    before = model_hash(SafetensorsSource(tmp_path / "a"), tmp_path / "cache")
    path = tmp_path / "a" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content + b"")
    assert model_hash(SafetensorsSource(tmp_path / "a"), tmp_path / "cache") != before


@pytest.mark.parametrize("content", ["{", "[]", '{"x": "y"}'])
def test_a_broken_cache_is_made_anew(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_safetensors(tmp_path / "a")
    name = model_hash(SafetensorsSource(tmp_path / "a"), tmp_path / "cache")
    (cached,) = (tmp_path / "cache" / "manifests").glob("*.json")
    cached.write_text(content)
    assert model_hash(SafetensorsSource(tmp_path / "a"), tmp_path / "cache") == name
    assert "hashing again" in caplog.text
    assert set(json.loads(cached.read_text())) != {"x"}


def test_a_server_checks_only_its_own_tensors(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "a")
    source = CountingSource(tmp_path / "a")
    manifest = build_manifest(source)
    source.hashed.clear()
    own = [name for name in source.tensor_names() if ".layers.2." in name]
    check_tensors(source, manifest, own)
    assert source.hashed == own
    with pytest.raises(ModelCorrupt, match=r"layers\.2"):
        check_tensors(altered(own[0]), manifest, own)


def test_hashing_reports_its_progress(tmp_path: Path) -> None:
    save_gguf(tmp_path / "m.gguf")
    from shoal.model.gguf_source import GgufSource

    steps: list[tuple[str, int, int]] = []
    model_hash(GgufSource(tmp_path / "m.gguf"), None, lambda *step: steps.append(step))
    done = [step[1] for step in steps]
    assert done == sorted(done)
    assert 0.9 * steps[-1][2] < done[-1] <= steps[-1][2]
