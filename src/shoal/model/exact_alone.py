"""Exact mode without batching: each call runs by itself, in the shape it first had.

Nothing but a call's own shape and its sequence's past can change a row's bits then. What is
left to take care of are calls that were cut after they first ran: they get their first
number of rows back, the missing ones as zeros, and experts compute in tiles, since zeros
choose other experts than the rows they stand for (`tiled_experts.py`).
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch

from shoal.base.spans import Span
from shoal.model.exact import tile_experts
from shoal.model.span_model import SpanModel
from shoal.model.tiled_experts import TiledExperts

_CALLS: Final = [21, 1, 1, 9]
"""Rows of the probe's calls: chunks longer and shorter than small windows, and decode."""

_CUT_ROWS: Final = 13
"""Rows that stay of the first call when it is cut."""


def probe_alone(model: SpanModel, experts: TiledExperts, device: str) -> str | None:
    """A hash of what bits depend on here; None if a repeated call came out different.

    Experts are tiled from then on, unless it is None. The hash doesn't depend on weights:
    servers of different spans are compared.
    """
    digest = hashlib.blake2b(digest_size=8, person=b"shoal-alone")
    if experts:
        probed = tile_experts(experts)
        if probed is None:
            return None
        digest.update(probed)
    if not all(_repeats(model, Span(block, block + 1), device) for block in model.block_kinds()):
        experts.reset()
        return None
    return digest.hexdigest()


@torch.inference_mode()
def _repeats(model: SpanModel, span: Span, device: str) -> bool:
    """Whether calls give the same bits again, cut ones too."""
    generator = torch.Generator().manual_seed(20_26)
    rows = torch.randn(sum(_CALLS), int(model.config.hidden_size), generator=generator)
    chunks = torch.split(rows.to(device, model.dtype), _CALLS)
    first, again = model.new_cache(span), model.new_cache(span)
    for chunk in chunks:
        expected = model.forward(chunk, first.length, first, span)
        if not torch.equal(expected, model.forward(chunk, again.length, again, span)):
            return False
        first.commit(len(chunk))
        again.commit(len(chunk))
    expected = model.forward(chunks[0], 0, model.new_cache(span), span)[:_CUT_ROWS]
    kept = chunks[0][:_CUT_ROWS]
    repeated = model.forward_cut(kept, len(chunks[0]), 0, model.new_cache(span), span)
    return torch.equal(repeated, expected)
