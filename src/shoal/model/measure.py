"""How fast a backend runs its blocks, measured in seconds on start."""

from __future__ import annotations

import asyncio
import random
import struct
from dataclasses import dataclass
from statistics import median
from typing import Final

from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span

_SEQUENCE: Final = SequenceId(-1)
"""Servers count up from 0."""

_PREFILL_TOKENS: Final = 64
_DECODE_STEPS: Final = 8
_BLOCKS: Final = 4
_BUDGET_S: Final = 2.0
"""Stop measuring after this: one step of huge blocks is measurement enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Seconds that one block takes, on an otherwise idle backend."""

    decode_s_per_block: float
    """One row, one block, short context."""
    prefill_s_per_block_token: float
    """One row of a chunk of 64, one block."""


async def measure_block_times(backend: BlockBackend) -> BlockTimes:
    """Run a short sequence through a few blocks; call it before serving. Under 3 s.

    Uses the running loop's clock.
    """
    facts = backend.facts
    span = Span(facts.span.start, min(facts.span.start + _BLOCKS, facts.span.end))
    prefill_tokens = min(_PREFILL_TOKENS, facts.cache_tokens // 2, facts.session_tokens_max // 2)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    backend.open(_SEQUENCE, span)
    try:
        # The first calls pay for lazy set-up in the libraries.
        await _timed(backend, span, 0, 1)
        backend.truncate(_SEQUENCE, 0)
        prefill_s = await _timed(backend, span, 0, prefill_tokens)
        decode_s: list[float] = []
        for step in range(_DECODE_STEPS):
            decode_s.append(await _timed(backend, span, prefill_tokens + step, 1))
            if loop.time() - start_s > _BUDGET_S:
                break
    finally:
        backend.close(_SEQUENCE)
    return BlockTimes(
        decode_s_per_block=median(decode_s) / len(span),
        prefill_s_per_block_token=prefill_s / len(span) / prefill_tokens,
    )


async def _timed(backend: BlockBackend, span: Span, position: int, count: int) -> float:
    facts = backend.facts
    rng = random.Random(position)
    values = [rng.gauss(0.0, 1.0) for _ in range(facts.hidden_size)]
    row = struct.pack(f"<{facts.hidden_size}f", *values)
    call = Call(
        sequence=_SEQUENCE,
        span=span,
        position=position,
        count=count,
        call_count=count,
        payload=bytearray(row * count),
        encoding="float32",
        output_encoding=facts.encodings[0],
        rows_wanted=count,
    )
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    (outcome,) = await backend.run([call])
    if not isinstance(outcome, bytes):
        raise outcome
    return loop.time() - start_s
