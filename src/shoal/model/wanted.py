"""Which stored tensors a server of a span, or a client, reads."""

from __future__ import annotations

import torch

from shoal.model.checkpoint import Checkpoint
from shoal.model.parts import Parts, meta_model
from shoal.model.source import ModelSource


def head_tensor_names(source: ModelSource) -> list[str]:
    """The tensors of embedding, final norm and head: what a client computes with.

    Raises:
        ModelUnsupported: an architecture without these parts.
    """
    whole = meta_model(source.config, torch.float32)
    parts = Parts(whole)
    checkpoint = Checkpoint(whole, source)
    family = parts.family
    paths = (family.embedding, family.norm, family.embedding_norm, family.positions)
    prefixes = [parts.name_of(path) for path in paths if path]
    if not getattr(source.config, "tie_word_embeddings", False):
        prefixes.append(parts.head_name())
    names = {name for prefix in prefixes for name in checkpoint.stored_names(f"{prefix}.")}
    return sorted(names)
