"""What a client runs itself: the embedding before block 0, norm and head after the last.

Shapes: S rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal.base.errors import BadInput
from shoal.model.families import family_of
from shoal.model.rows import rows_from_bytes, rows_to_bytes, torch_dtype
from shoal.model.source import ModelSource
from shoal.model.span_model import fill, meta_model


class Head:
    """Embedding, final norm and language-model head of one model. Made by `load_head`."""

    def __init__(
        self, embedding: torch.nn.Module, norm: torch.nn.Module, head: torch.nn.Module, device: str
    ) -> None:
        self._embedding = embedding
        self._norm = norm
        self._head = head
        self._device = device
        weight: Any = embedding.weight
        self.vocab_size, self.hidden_size = (int(size) for size in weight.shape)
        self._dtype: torch.dtype = weight.dtype

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], encoding: str) -> bytes:
        """The tokens' rows for block 0, in `encoding`.

        Raises:
            BadInput: no tokens, a token outside the vocabulary, an unknown encoding.
        """
        if not token_ids:
            raise BadInput("no tokens to embed")
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < self.vocab_size:
                raise BadInput(f"token {token} is outside the vocabulary of {self.vocab_size}")
        ids = torch.tensor(list(token_ids), dtype=torch.long, device=self._device)
        return rows_to_bytes(self._embedding(ids), encoding)

    @torch.inference_mode()
    def logits(self, rows: bytes | bytearray | memoryview, encoding: str) -> torch.Tensor:
        """(S, V) float32 scores on the CPU for S rows that left the last block.

        Computed in the head's own dtype, like transformers does.

        Raises:
            BadInput: not whole rows, or an unknown encoding.
        """
        row_bytes = self.hidden_size * _item_bytes(encoding)
        count = max(1, memoryview(rows).nbytes // row_bytes)
        hidden = rows_from_bytes(rows, encoding, count, self.hidden_size)
        normed = self._norm(hidden.to(device=self._device, dtype=self._dtype))
        scores: torch.Tensor = self._head(normed)
        return scores.to(device="cpu", dtype=torch.float32)


def load_head(source: ModelSource, *, dtype: str = "float32", device: str = "cpu") -> Head:
    """Read embedding, norm and head of `source` and nothing else.

    Raises:
        ConfigError: unknown dtype.
        ModelCorrupt: a tensor is missing or has a wrong shape.
    """
    kind = torch_dtype(dtype)
    whole = meta_model(source.config, kind)
    family = family_of(source.config)
    prefix = f"{whole.base_model_prefix}."
    embedding = getattr(whole.base_model, family.embedding)
    norm = getattr(whole.base_model, family.norm)
    head = whole.get_output_embeddings()
    fill(embedding, source, f"{prefix}{family.embedding}.", kind, device)
    fill(norm, source, f"{prefix}{family.norm}.", kind, device)
    if getattr(source.config, "tie_word_embeddings", False):
        head.weight = embedding.weight
    else:
        fill(head, source, "lm_head.", kind, device)
    return Head(embedding, norm, head, device)


def _item_bytes(encoding: str) -> int:
    # A wrong name gets its BadInput from rows_from_bytes.
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(encoding, 1)
