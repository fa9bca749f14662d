"""A model out of the local store: described by its manifest, held as far as it was fetched.

The config comes from the manifest's identity alone, so whoever trusts the model's name can
trust it. The same two kinds of weights exist as on disk: those of safetensors, and those of a
GGUF file, dequantised on read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoal.base.errors import ModelCorrupt, ModelUnsupported
from shoal.model.families import family_of
from shoal.model.gguf_config import gguf_config
from shoal.model.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from shoal.model.gguf_tensors import (
    ROPE_FACTORS,
    dequantised,
    gguf_end_tokens,
    gguf_name,
    gguf_tokenizer,
    in_model_order,
)
from shoal.model.manifest import Manifest, TensorEntry
from shoal.model.manifest_text import stored_num_bytes
from shoal.model.rows import tensor_bytes
from shoal.model.safetensors_source import TORCH_DTYPES, end_tokens
from shoal.model.source import StoredTensor
from shoal.model.weight_store import WeightStore

BLOCKS_MAX: Final = 65_535
"""As records allow."""

_ARCHITECTURE: Final = "general.architecture"

_BLOCK_COUNTS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "block_count")
"""Keys that say how many blocks there are; each has at least one tensor."""

_NOT_TAKEN: Final = ("auto_map", "attn_implementation", "experts_implementation")
"""Config keys by which a model could name code to load; those that begin with _ go too."""

_READ_BYTES: Final = 16 << 20


class StoreSource:
    """A model of the store. `files` is the folder of its tokenizer, if that was fetched.

    Raises:
        ModelUnsupported: an architecture, an option or a type that can't be served.
        ModelCorrupt: the manifest contradicts itself.
    """

    def __init__(self, manifest: Manifest, store: WeightStore, files: Path | None = None) -> None:
        self.manifest = manifest
        self._store = store
        self._side_folder = files
        self._entries = {entry.name: entry for entry in manifest.tensors}
        self._sizes = {
            name: stored_num_bytes(entry.shape, entry.dtype)
            for name, entry in self._entries.items()
        }
        _check_counts(manifest)
        self._architecture = manifest.identity.get(_ARCHITECTURE)
        if self._architecture is None:
            self.config = _config_of(manifest)
        else:
            self.config = _gguf_config_of(manifest, self._sizes)
        family_of(self.config)

    def use_files(self, folder: Path) -> None:
        """Take the tokenizer from this folder from now on."""
        self._side_folder = folder

    @property
    def identity(self) -> Mapping[str, Any]:
        """The manifest's."""
        return self.manifest.identity

    @property
    def files(self) -> tuple[Path, ...]:
        """None that could be hashed as a whole: everything here is under its hash."""
        return ()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """From the files that came with the tokenizer, else from the config."""
        folder = self._side_folder
        if self._architecture is None:
            return end_tokens(self.config, folder)
        if folder is None or not (folder / "tokenizer.gguf").exists():
            return ()
        return gguf_end_tokens(read_gguf_header(folder / "tokenizer.gguf").metadata)

    def tensor_names(self) -> Sequence[str]:
        """All tensors of the manifest, sorted, whether they are here or not."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """One tensor's row of the manifest."""
        return self._entries[name]

    def num_bytes(self, name: str) -> int:
        """Bytes of one tensor as stored."""
        return self._sizes[name]

    def holds(self, name: str) -> bool:
        """Whether the tensor is here."""
        return self._store.has(self._entries[name].content, self._sizes[name])

    def stored(self, name: str) -> StoredTensor:
        """Shape and type from the manifest."""
        entry = self._entries[name]
        return StoredTensor(shape=entry.shape, dtype=entry.dtype)

    def stored_bytes(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes, piece by piece."""
        for start in range(0, self._sizes[name], _READ_BYTES):
            yield memoryview(self.read_stored(name, start, _READ_BYTES))

    def read_stored(self, name: str, start: int, count: int) -> bytes:
        """A part of the tensor's bytes."""
        found = self._store.read(self._entries[name].content, start, count)
        if found is None:
            raise ModelCorrupt(f"{name} is not on this machine: fetch the weights again")
        return found

    def side_files(self) -> Mapping[str, bytes]:
        """The tokenizer's files, if they were fetched."""
        if self._side_folder is None:
            return {}
        return {path.name: path.read_bytes() for path in sorted(self._side_folder.iterdir())}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, checked against its hash; from GGUF as float32."""
        entry = self._entries[name]
        raw = torch.empty(self._sizes[name], dtype=torch.uint8)
        self._store.read_into(entry.content, tensor_bytes(raw))
        if self._architecture is not None:
            kind = GGMLQuantizationType[entry.dtype]
            values = dequantised(name, raw.numpy(), entry.shape, kind)
            values = in_model_order(values, name, self._architecture, self.config)
            return torch.from_numpy(values)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise ModelUnsupported(f"{name} is stored as {entry.dtype}")
        return raw.view(dtype).view(entry.shape)

    def tokenizer(self) -> Any:
        """The tokenizer whose files came from peers; no code of theirs is ever run."""
        folder = self._side_folder
        if folder is None:
            raise ModelUnsupported("no tokenizer was fetched with these weights")
        path = folder / "tokenizer.gguf"
        if path.exists():
            return gguf_tokenizer(path, read_gguf_header(path).metadata)
        try:
            return AutoTokenizer.from_pretrained(
                folder, config=self.config, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelUnsupported(
                f"the tokenizer that came with these weights is unusable: {error}"
            ) from error


def _check_counts(manifest: Manifest) -> None:
    """Before a config is made of them: a list per block is made with it."""
    for key, value in manifest.identity.items():
        if key.endswith(_BLOCK_COUNTS) and not (
            type(value) is int and 0 < value <= min(BLOCKS_MAX, len(manifest.tensors))
        ):
            raise ModelUnsupported(
                f"the manifest says {key} = {value!r:.40}, of {len(manifest.tensors)} tensors"
            )


def _config_of(manifest: Manifest) -> Any:
    model_type = manifest.identity.get("model_type")
    if not isinstance(model_type, str):
        raise ModelUnsupported("the manifest names no architecture")
    try:
        values = {
            key: _with_floats(value)
            for key, value in manifest.identity.items()
            if key not in _NOT_TAKEN and not key.startswith("_")
        }
        config: Any = CONFIG_MAPPING[model_type].from_dict(values)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelUnsupported(f"transformers rejects the manifest's config: {error}") from error
    return config


def _with_floats(value: Any) -> Any:
    """Infinity and NaN, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def _gguf_config_of(manifest: Manifest, sizes: Mapping[str, int]) -> Any:
    tensors = {}
    for entry in manifest.tensors:
        try:
            kind = GGMLQuantizationType[entry.dtype]
        except KeyError:
            raise ModelUnsupported(f"{entry.name} is stored as {entry.dtype}") from None
        tensors[gguf_name(entry.name)] = GgufTensor(
            shape=entry.shape, quantisation=kind, offset=0, num_bytes=sizes[entry.name]
        )
    factors = manifest.identity.get(ROPE_FACTORS)
    header = GgufHeader(metadata=manifest.identity, tensors=tensors)
    try:
        array = None if factors is None else np.array(factors, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ModelCorrupt(f"the manifest's rope factors are no numbers: {error}") from error
    return gguf_config(Path("manifest"), header, array)
