"""What a client runs itself: the embedding before block 0, norm and head after the last.

What families add there belongs here too: learned positions, norms and factors on
embeddings, factors and soft caps on scores. `load_head` proves on start that the pieces
give the scores of transformers' own model with its blocks passed through.
Shapes: S rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from shoal.base.errors import BadInput, ModelUnsupported
from shoal.model.checkpoint import Checkpoint
from shoal.model.onednn_linear import OneDnnLinear, packed_linear
from shoal.model.parts import Parts, check_nothing_on_meta, fill_tables, meta_model
from shoal.model.rows import rows_from_bytes, rows_to_bytes, torch_dtype
from shoal.model.source import ModelSource
from shoal.wire.tensors import row_bytes

_PROBE_TOKENS = 3

TIED_BYTES_MAX: Final = 512 << 20
"""A head that is the embedding's own matrix is held a second time, in the layout that it is
multiplied in, up to this size: that of a 128,256 x 2,048 one in bfloat16 is 501 MiB."""


class Head:
    """Embedding, final norm and language-model head of one model. Made by `load_head`."""

    def __init__(self, parts: Parts) -> None:
        self._embedding = parts.embedding
        self._embedding_norm = parts.embedding_norm
        self._positions = parts.positions
        self._norm = parts.norm
        self._head = parts.head
        family, config = parts.family, parts.whole.config
        self._embedding_factor: float | None = None
        if family.embedding_multiplier:
            self._embedding_factor = getattr(parts.core, family.embedding_multiplier)
        self._factor = _option(config, family.logit_factor)
        self._divisor = _option(config, family.logit_divisor)
        self._softcap = _option(config, family.logit_softcap)
        self.vocab_size, self.hidden_size = (int(size) for size in parts.embedding.weight.shape)
        for part in self.modules().values():
            part.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._embedding.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self._embedding.weight.dtype
        return dtype

    def pack(self) -> None:
        """Rearrange the head once for oneDNN, on a CPU.

        Measured, one thread, milliseconds for 1, 8 and 512 rows: 49,152 x 576 in float32 7.6, 17.6
        and 572, packed 3.3, 4.9 and 252; 32,000 x 2,048 in bfloat16 9.5, 12.4 and 228, packed 3.8,
        5.8 and 217.
        """
        if type(self._head) is torch.nn.Linear:
            weight = self._head.weight
            if weight is not self._embedding.weight or weight.nbytes <= TIED_BYTES_MAX:
                self._head = packed_linear(self._head)

    def modules(self) -> dict[str, torch.nn.Module]:
        """Its torch modules by name: embedding, norm, head, and what the family adds."""
        parts = {
            "embedding": self._embedding,
            "embedding_norm": self._embedding_norm,
            "positions": self._positions,
            "norm": self._norm,
            "head": self._head,
        }
        return {name: part for name, part in parts.items() if part is not None}

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[int], encoding: str, position: int = 0) -> bytes:
        """The tokens' rows for block 0, in `encoding`; the first token is at `position`.

        Raises:
            BadInput: no tokens, a token outside the vocabulary, a position beyond the
                learned ones, an unknown encoding.
        """
        if not token_ids:
            raise BadInput("no tokens to embed")
        for token in (min(token_ids), max(token_ids)):
            if not 0 <= token < self.vocab_size:
                raise BadInput(f"token {token} is outside the vocabulary of {self.vocab_size}")
        ids = torch.tensor(list(token_ids), dtype=torch.long, device=self.device)
        return rows_to_bytes(self._rows(self._embedding(ids), position), encoding)

    @torch.inference_mode()
    def embed_given(self, embeddings: torch.Tensor, encoding: str, position: int = 0) -> bytes:
        """The rows for block 0 of (S, D) embeddings that replace looked-up ones.

        What a family does to embeddings (factors, positions, norms) is done to these too,
        as transformers does with `inputs_embeds`.

        Raises:
            BadInput: a wrong shape, a position beyond the learned ones, an unknown encoding.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.hidden_size:
            raise BadInput(
                f"embeddings of shape {tuple(embeddings.shape)}: give (tokens, {self.hidden_size})"
            )
        given = embeddings.to(device=self.device, dtype=self.dtype)
        return rows_to_bytes(self._rows(given, position), encoding)

    @torch.inference_mode()
    def logits(self, rows: bytes | bytearray | memoryview, encoding: str) -> torch.Tensor:
        """(S, V) float32 scores on the CPU for S rows that left the last block.

        Computed in the head's own dtype, like transformers does.

        Raises:
            BadInput: not whole rows, or an unknown encoding.
        """
        count = max(1, memoryview(rows).nbytes // row_bytes(encoding, self.hidden_size))
        hidden = rows_from_bytes(rows, encoding, count, self.hidden_size)
        return self.scores(hidden)

    @torch.no_grad()
    def normalized(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) hidden states that left the last block, after the final norm."""
        return self.leave_blocks(hidden)

    @torch.no_grad()
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., V) float32 scores on the CPU for (..., D) rows that left the last block."""
        return self.score_states(self.leave_blocks(hidden))

    # --- with gradients, for training; the weights here are frozen ------------------------

    def look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(B, S, D) embeddings of (B, S) tokens as they are stored: for `enter_blocks`.

        Raises:
            BadInput: no tokens, or one outside the vocabulary.
        """
        if not token_ids.numel() or int(token_ids.min()) < 0:
            raise BadInput("no tokens to embed, or one below 0")
        if int(token_ids.max()) >= self.vocab_size:
            raise BadInput(
                f"token {int(token_ids.max())} is outside the vocabulary of {self.vocab_size}"
            )
        found: torch.Tensor = self._embedding(token_ids.to(self.device))
        return found

    def enter_blocks(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, S, D) rows for block 0 of (B, S, D) embeddings from position 0 on, as
        `embed_given` makes them. Differentiable.

        Raises:
            BadInput: a position beyond the learned ones.
        """
        rows = embeddings.to(device=self.device, dtype=self.dtype)
        if self._embedding_factor is not None:
            rows = rows * self._embedding_factor
        if self._positions is not None:
            rows = rows + self._learned_positions(0, rows.shape[1])
        return rows if self._embedding_norm is None else self._embedding_norm(rows)

    def leave_blocks(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) hidden states that left the last block, after the final norm. Differentiable."""
        hidden = hidden.to(device=self.device, dtype=self.dtype)
        normalized: torch.Tensor = hidden if self._norm is None else self._norm(hidden)
        return normalized

    def score_states(self, states: torch.Tensor) -> torch.Tensor:
        """(..., V) float32 scores on the CPU of `leave_blocks`' states. Differentiable."""
        if isinstance(self._head, OneDnnLinear) and torch.is_grad_enabled():
            self._head.keep_transposed()  # there is one client, and every step goes back through it
        scores: torch.Tensor = self._head(states.to(device=self.device, dtype=self.dtype))
        if self._factor is not None:
            scores = scores * self._factor
        if self._divisor is not None:
            scores = scores / self._divisor
        if self._softcap is not None:
            scores = torch.tanh(scores / self._softcap) * self._softcap
        return scores.to(device="cpu", dtype=torch.float32)

    def _rows(self, embeddings: torch.Tensor, position: int) -> torch.Tensor:
        rows = embeddings
        if self._embedding_factor is not None:
            rows = rows * self._embedding_factor
        if self._positions is not None:
            rows = rows + self._learned_positions(position, rows.shape[0])
        if self._embedding_norm is not None:
            rows = self._embedding_norm(rows)
        return rows

    def _learned_positions(self, position: int, count: int) -> torch.Tensor:
        # OPT's table starts with two rows for padding.
        first = position + int(getattr(self._positions, "offset", 0))
        table: torch.Tensor = self._positions.weight
        if first + count > table.shape[0]:
            raise BadInput(f"the model has no position {position + count - 1}")
        return table[first : first + count]


def load_head(source: ModelSource, *, dtype: str = "float32", device: str = "cpu") -> Head:
    """Read embedding, norm and head of `source` and nothing else.

    Raises:
        ConfigError: unknown dtype.
        ModelCorrupt: a tensor is missing or has a wrong shape.
        ModelUnsupported: an architecture that does more there than we know of.
    """
    whole = meta_model(source.config, torch_dtype(dtype))
    parts = Parts(whole)
    checkpoint = Checkpoint(whole, source)
    family = parts.family
    for part, path in (
        (parts.embedding, family.embedding),
        (parts.norm, family.norm),
        (parts.embedding_norm, family.embedding_norm),
        (parts.positions, family.positions),
    ):
        if part is not None:
            checkpoint.fill(part, f"{parts.name_of(path)}.", device)
    head_name = parts.head_name()
    if getattr(source.config, "tie_word_embeddings", False):
        parts.head.weight = parts.embedding.weight
        if getattr(parts.head, "bias", None) is not None:
            raise ModelUnsupported("tied embeddings with a bias on the head")
    else:
        checkpoint.fill(parts.head, f"{head_name}.", device)
    delattr(parts.core, family.blocks)  # modules can't be replaced by anything else
    setattr(parts.core, family.blocks, tuple(parts.pass_through(set()).values()))
    fill_tables(whole, whole, device)
    check_nothing_on_meta(whole)
    head = Head(parts)
    _probe(head, whole, device)
    head.pack()
    return head


def _probe(head: Head, whole: Any, device: str) -> None:
    """Compare with transformers' model on a few tokens, blocks passed through.

    Raises:
        ModelUnsupported: the scores differ.
    """
    tokens = [(7 * index + 1) % head.vocab_size for index in range(_PROBE_TOKENS)]
    try:
        with torch.inference_mode():
            expected = whole(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    except (TypeError, AttributeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ModelUnsupported(
            f"architecture {whole.config.model_type!r} does not run without its blocks: {error}"
        ) from error
    # float32, the widest encoding, carries rows of every dtype unchanged.
    scores = head.logits(head.embed(tokens, "float32"), "float32")
    if not torch.equal(scores, expected.logits[0].to(device="cpu", dtype=torch.float32)):
        raise ModelUnsupported(
            f"architecture {whole.config.model_type!r} does more to embeddings or scores than "
            "the client's head knows of"
        )


def _option(config: Any, name: str) -> float | None:
    value = getattr(config, name) if name else None
    return None if value is None else float(value)
