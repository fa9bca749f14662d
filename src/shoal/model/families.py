"""Which architectures can be served, and where each keeps its parts.

One row per `model_type` of transformers. Everything else in this package is generic: a
family that names its parts like llama needs a row here and a golden test, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal.base.errors import ModelUnsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Names of the parts inside transformers' base model (`XxxModel`)."""

    blocks: str = "layers"
    norm: str = "norm"
    embedding: str = "embed_tokens"


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
}


def family_of(config: Any) -> Family:
    """The row for a transformers config.

    Raises:
        ModelUnsupported: no row; names those there are.
    """
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelUnsupported(
            f"architecture {model_type!r} cannot be served (supported: {', '.join(FAMILIES)})"
        )
    return family
