"""Latent attention (MLA, deepseek_v3) in packed passes.

The cache keeps one compressed row per position for all heads, and its rotated part: a
fraction of the keys and values they stand for. Prefill chunks expand them, as transformers
does. A single row does not: its query is taken to the compressed space and its result back
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2), so that a token costs the same products
however long its past is.
Shapes: S rows, L keys, N heads, R compressed size, P rotated size, C unrotated size of a
head, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


class LatentAttention:
    """What packed attention must know of one attention module with latent keys and values."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._unrotated = int(module.qk_nope_head_dim)
        self._value_size = int(module.v_head_dim)

    @property
    def product(self) -> torch.nn.Module:
        """The layer that expands: it runs for one sequence at a time."""
        layer: torch.nn.Module = self._module.kv_b_proj
        return layer

    def placeholders(
        self, latents: torch.Tensor, _rotated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of the expanded keys and values of new rows: packed attention reads its own.

        Only the size of the values is looked at.
        """
        shape = (*latents.shape[:3], self._value_size)
        return latents, latents.new_zeros(1).expand(shape)

    def expanded(
        self, latents: torch.Tensor, rotated: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, N, L, C + P) keys and values of (1, 1, L, R) latents and (1, 1, L, P).

        Values are as wide as keys, zeros behind their own V: torch's fast kernels want that.
        """
        keys, values = type(self._module).expand_kv(self._module, latents, rotated)
        return keys, functional.pad(values, (0, keys.shape[3] - values.shape[3]))

    def attend_one(
        self, query: torch.Tensor, latents: torch.Tensor, rotated: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """(N, V) attention of one row (1, N, 1, C + P) to all positions given."""
        if not isinstance(self._module.kv_b_proj, torch.nn.Linear):
            # Quantised: its weights can't be taken apart.
            keys, values = self.expanded(latents, rotated)
            result = functional.scaled_dot_product_attention(query, keys, values, scale=scale)
            return result[0, :, 0, : self._value_size]
        size = latents.shape[3]
        heads = query.shape[1]
        weight = self._module.kv_b_proj.weight.view(heads, -1, size)
        to_latent, to_value = weight[:, : self._unrotated], weight[:, self._unrotated :]
        plain, turned = query[0, :, :, : self._unrotated], query[0, :, :, self._unrotated :]
        # All heads share the keys: they are the rows of one product.
        rows = torch.cat([torch.bmm(plain, to_latent), turned], dim=2).transpose(0, 1).unsqueeze(0)
        keys = torch.cat([latents, rotated], dim=3)
        result = functional.scaled_dot_product_attention(rows, keys, keys, scale=scale)
        compressed = result[0, 0, :, :size].unsqueeze(1)
        return torch.bmm(compressed, to_value.transpose(1, 2)).squeeze(1)


def use_latent_attention(block: torch.nn.Module) -> None:
    """Let the latent attention of `block`, if it has any, run in packed passes."""
    for module in block.modules():
        if hasattr(type(module), "expand_kv") and latent_of(module) is None:
            latent: Any = LatentAttention(module)
            module.shoal_latent = latent
            module.expand_kv = latent.placeholders


def latent_of(module: torch.nn.Module) -> LatentAttention | None:
    """What `use_latent_attention` gave to an attention module."""
    return getattr(module, "shoal_latent", None)
