"""A model out of the store computes what the original computes; manifests are believed little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig

from shoal.base.content import content_hash, manifest_hash
from shoal.base.errors import ModelCorrupt, ModelUnsupported
from shoal.base.spans import Span
from shoal.model.gguf_source import GgufSource
from shoal.model.manifest import Manifest, TensorEntry, build_manifest
from shoal.model.manifest_text import parse_manifest, stored_num_bytes
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.shelf import ModelShelf
from shoal.model.source import ModelSource
from shoal.model.span_model import span_tensor_names
from shoal.model.store_source import StoreSource
from shoal.model.wanted import head_tensor_names
from shoal.model.weight_store import WeightStore
from tests.models import FAMILIES, save_gguf, save_safetensors, tiny_config

ENTRIES = tuple(
    TensorEntry(name=f"t{index}", shape=(), dtype="F32", content="0" * 32) for index in range(9)
)


def stored(source: ModelSource, root: Path, names: list[str] | None = None) -> StoreSource:
    """The same model by way of a shelf and a store, as far as `names` go (default: all)."""
    manifest = build_manifest(source)
    shelf, store = ModelShelf(source, manifest), WeightStore(root)
    parsed = parse_manifest(shelf.text, shelf.model)
    copy = StoreSource(parsed, store)
    for name in copy.tensor_names() if names is None else names:
        content, num_bytes = copy.entry(name).content, copy.num_bytes(name)
        draft = store.begin(content, num_bytes)
        for start in range(0, num_bytes, 1000):
            piece = shelf.read(content, start, min(1000, num_bytes - start))
            assert piece is not None
            draft.append(piece)
        assert draft.finish(), name
        draft.close()
    return copy


def check_same(source: ModelSource, copy: StoreSource) -> None:
    assert list(copy.tensor_names()) == sorted(source.tensor_names())
    for name in source.tensor_names():
        assert copy.stored(name) == source.stored(name)
        assert torch.equal(copy.read(name), source.read(name)), name
        assert b"".join(copy.stored_bytes(name)) == b"".join(source.stored_bytes(name))
    assert settings(copy.config) == settings(source.config)
    assert build_manifest(copy).model_name() == build_manifest(source).model_name()


def settings(config: Any) -> dict[str, Any]:
    """A config without what says who saved it."""
    dropped = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
               "bos_token_id", "eos_token_id", "use_cache")  # fmt: skip
    return {key: value for key, value in config.to_dict().items() if key not in dropped}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors_by_way_of_the_store(tmp_path: Path, dtype: torch.dtype) -> None:
    save_safetensors(tmp_path / "model", sharded=True, dtype=dtype)
    source = SafetensorsSource(tmp_path / "model")
    check_same(source, stored(source, tmp_path / "store"))


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", "F32"), ("qwen2", "F32"), ("llama3_rope", "F32"), ("wide", "Q4_1")],
)
def test_gguf_by_way_of_the_store(tmp_path: Path, family: str, kind: str) -> None:
    save_gguf(tmp_path / "m.gguf", family, quantisation=gguf.GGMLQuantizationType[kind])
    source = GgufSource(tmp_path / "m.gguf")
    check_same(source, stored(source, tmp_path / "store"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_manifest_says_the_whole_config(tmp_path: Path, family: str) -> None:
    tiny_config(family).save_pretrained(tmp_path)
    from shoal.model.safetensors_source import _NOT_IDENTITY

    values = json.loads((tmp_path / "config.json").read_text())
    identity = {key: value for key, value in values.items() if key not in _NOT_IDENTITY}
    source = StoreSource(Manifest(identity=identity, tensors=ENTRIES), WeightStore(tmp_path / "s"))
    assert settings(source.config) == settings(AutoConfig.from_pretrained(tmp_path))


def test_only_the_spans_tensors_are_needed_and_the_rest_is_an_error(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model")
    source = SafetensorsSource(tmp_path / "model")
    names = span_tensor_names(source, Span(2, 4))
    copy = stored(source, tmp_path / "store", names)
    assert sorted(name for name in copy.tensor_names() if copy.holds(name)) == sorted(names)
    assert span_tensor_names(copy, Span(2, 4)) == names
    with pytest.raises(ModelCorrupt, match="fetch the weights again"):
        copy.read("model.norm.weight")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]),
        ("llama_tied", ["model.embed_tokens.weight", "model.norm.weight"]),
    ],
)
def test_what_a_client_needs(tmp_path: Path, family: str, expected: list[str]) -> None:
    save_safetensors(tmp_path, family)
    assert head_tensor_names(SafetensorsSource(tmp_path)) == expected


def test_a_config_can_name_no_code(tmp_path: Path) -> None:
    identity = tiny_config().to_dict() | {
        "auto_map": {"AutoConfig": "evil--code.Config"},
        "_attn_implementation": "evil/kernel",
        "attn_implementation": "evil/kernel",
    }
    source = StoreSource(Manifest(identity=identity, tensors=ENTRIES), WeightStore(tmp_path))
    assert not hasattr(source.config, "auto_map")
    assert source.config._attn_implementation != "evil/kernel"


@pytest.mark.parametrize(
    "identity",
    [
        {},
        {"model_type": "no-such-thing"},
        {"model_type": 5},
        {"model_type": "llama", "num_hidden_layers": 10**9},
        {"model_type": "llama", "num_hidden_layers": "many"},
        {"general.architecture": "llama"},
        {"general.architecture": 7},
    ],
)
def test_identities_that_cannot_be(tmp_path: Path, identity: dict[str, Any]) -> None:
    with pytest.raises((ModelUnsupported, ModelCorrupt)):
        StoreSource(Manifest(identity=identity, tensors=ENTRIES), WeightStore(tmp_path))


# --- manifests --------------------------------------------------------------------------------

HASH = "0" * 32


def text_of(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def test_a_manifest_survives_its_text() -> None:
    entry = TensorEntry(name="a", shape=(2, 3), dtype="F32", content=HASH)
    manifest = Manifest(identity={"x": [1.5, None, "ü"]}, tensors=(entry,))
    assert parse_manifest(manifest.text(), manifest.model_name()) == manifest
    with pytest.raises(ModelCorrupt, match="not the manifest of model 000"):
        parse_manifest(manifest.text(), HASH)


@pytest.mark.parametrize(
    "value",
    [
        5,
        [],
        ["shoal-manifest-2", {}, []],
        ["shoal-manifest-1", [], []],
        ["shoal-manifest-1", {}, {}],
        ["shoal-manifest-1", {}, [["a", [1], "F32"]]],
        ["shoal-manifest-1", {}, [["", [1], "F32", HASH]]],
        ["shoal-manifest-1", {}, [["x" * 513, [1], "F32", HASH]]],
        ["shoal-manifest-1", {}, [["a", [-1], "F32", HASH]]],
        ["shoal-manifest-1", {}, [["a", [True], "F32", HASH]]],
        ["shoal-manifest-1", {}, [["a", [1.0], "F32", HASH]]],
        ["shoal-manifest-1", {}, [["a", [1] * 9, "F32", HASH]]],
        ["shoal-manifest-1", {}, [["a", 1, "F32", HASH]]],
        ["shoal-manifest-1", {}, [["a", [1], 4, HASH]]],
        ["shoal-manifest-1", {}, [["a", [1], "F32", "../" + HASH]]],
        ["shoal-manifest-1", {}, [["b", [], "F32", HASH], ["a", [], "F32", HASH]]],
        ["shoal-manifest-1", {}, [["a", [], "F32", HASH], ["a", [], "F32", HASH]]],
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_no_manifest(value: Any) -> None:
    text = text_of(value)
    with pytest.raises(ModelCorrupt, match="malformed"):
        parse_manifest(text, manifest_hash(text))


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"\xff", b'["shoal-manifest-1", {}, []]'])
def test_texts_that_are_no_manifest(text: bytes) -> None:
    with pytest.raises(ModelCorrupt):
        parse_manifest(text, manifest_hash(text))


@pytest.mark.parametrize(
    ("shape", "dtype", "num_bytes"),
    [
        ((), "F32", 4), ((0, 5), "F32", 0), ((3, 5), "BF16", 30), ((7,), "U8", 7),
        ((2, 64), "Q4_1", 80), ((2, 256), "Q4_K", 288), ((2, 3), "torch.bfloat16", 12),
    ],
)  # fmt: skip
def test_how_many_bytes_a_tensor_has(shape: tuple[int, ...], dtype: str, num_bytes: int) -> None:
    assert stored_num_bytes(shape, dtype) == num_bytes


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1,), "F33"), ((2, 33), "Q4_1"), ((1 << 20, 1 << 20), "F32")]
)
def test_tensors_that_cannot_be(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(ModelUnsupported):
        stored_num_bytes(shape, dtype)


# --- shelves ----------------------------------------------------------------------------------


def test_a_shelf_hands_out_only_what_the_manifest_names(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "secret.txt").write_text("mine")
    source = SafetensorsSource(tmp_path / "model")
    manifest = build_manifest(source)
    shelf = ModelShelf(source, manifest, lambda name: ".layers.1." in name)
    names = [entry.name for entry in manifest.tensors]
    assert shelf.held() == [".layers.1." in name for name in names]
    files = {one.name for one in shelf.side_files()}
    assert "tokenizer.json" in files
    assert "secret.txt" not in files
    assert "config.json" not in files
    assert shelf.read(content_hash(b"mine"), 0, 4) is None
    assert shelf.read(content_hash(b"{}"), 0, 2) == b"{}"
    assert shelf.read(content_hash(b"{}"), 1, 2) is None
    assert shelf.read(shelf.model, 0, 5) == manifest.text()[:5]
    for entry in manifest.tensors:
        piece = shelf.read(entry.content, 0, 4)
        assert (piece is not None) == (".layers.1." in entry.name)
        size = stored_num_bytes(entry.shape, entry.dtype)
        assert shelf.read(entry.content, size - 1, 2) is None
