"""Reading a manifest that came from elsewhere, and how many bytes its tensors have.

A manifest is believed because its text hashes to the model's name, so only whoever made the
model can have put nonsense into it. That too is refused by name before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from typing import Any, Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from shoal.base.content import is_hash, manifest_hash
from shoal.base.errors import ModelCorrupt, ModelUnsupported
from shoal.base.limits import MANIFEST_BYTES_MAX, TENSORS_MAX
from shoal.model.manifest import Manifest, TensorEntry

NAME_CHARS_MAX: Final = 512
"""Characters of a tensor's name; real ones have up to a hundred."""

DIMENSIONS_MAX: Final = 8
"""Real tensors have up to five."""

TENSOR_BYTES_MAX: Final = 1 << 40
"""One tensor: the largest fused experts have 10 GB."""

_VALUE_BYTES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32", "torch.float32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
    **dict.fromkeys(("torch.float16", "torch.bfloat16"), 2),
}
"""Types of safetensors, and of models in memory."""


def parse_manifest(text: bytes, name: str) -> Manifest:
    """The manifest whose text this is.

    Raises:
        ModelCorrupt: it does not hash to `name`, or is no manifest.
    """
    if len(text) > MANIFEST_BYTES_MAX:
        raise ModelCorrupt(f"a manifest of {len(text)} bytes (limit {MANIFEST_BYTES_MAX})")
    if manifest_hash(text) != name:
        raise ModelCorrupt(f"this is not the manifest of model {name}")
    try:
        manifest = _read(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ModelCorrupt(f"the manifest of {name} is malformed: {error}") from error
    if manifest.text() != text:
        raise ModelCorrupt(f"the manifest of {name} is not in its fixed form")
    return manifest


def _read(value: Any) -> Manifest:
    kind, identity, rows = value
    if kind != "shoal-manifest-1" or not isinstance(identity, dict) or not isinstance(rows, list):
        raise ValueError("not a manifest of version 1")
    if len(rows) > TENSORS_MAX:
        raise ValueError(f"{len(rows)} tensors (limit {TENSORS_MAX})")
    tensors = tuple(_entry(row) for row in rows)
    names = [tensor.name for tensor in tensors]
    if names != sorted(set(names)):
        raise ValueError("tensors are not sorted by name, each once")
    return Manifest(identity=identity, tensors=tensors)


def _entry(row: Any) -> TensorEntry:
    name, shape, dtype, content = row
    if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARS_MAX:
        raise ValueError(f"a tensor named {name!r:.100}")
    if not isinstance(dtype, str) or not isinstance(content, str) or not is_hash(content):
        raise ValueError(f"{name} has no type or no hash")
    if not isinstance(shape, list) or len(shape) > DIMENSIONS_MAX:
        raise ValueError(f"{name} has no shape")
    if any(type(size) is not int or not 0 <= size <= TENSOR_BYTES_MAX for size in shape):
        raise ValueError(f"{name} has shape {shape!r:.100}")
    return TensorEntry(name=name, shape=tuple(shape), dtype=dtype, content=content)


def stored_num_bytes(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a tensor as it is stored.

    Raises:
        ModelUnsupported: an unknown type, or a size that cannot be.
    """
    num_values = prod(shape)
    value_bytes = _VALUE_BYTES.get(dtype)
    if value_bytes is not None:
        num_bytes = num_values * value_bytes
    else:
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
        except KeyError:
            raise ModelUnsupported(f"tensors of type {dtype!r:.40} are not known here") from None
        if shape and shape[-1] % block:
            raise ModelUnsupported(f"rows of {shape[-1]} are not whole {block}-blocks of {dtype}")
        num_bytes = num_values // block * block_bytes
    if num_bytes > TENSOR_BYTES_MAX:
        raise ModelUnsupported(f"a tensor of {num_bytes} bytes (limit {TENSOR_BYTES_MAX})")
    return num_bytes
