"""How fast a backend runs its blocks, measured in seconds on start."""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
from dataclasses import dataclass
from statistics import median
from typing import Final

from shoal.base.backend import BackendFacts, BlockBackend, Call, SequenceId
from shoal.base.spans import Span

_SEQUENCE: Final = SequenceId(-1)
"""Servers count up from 0."""

_PREFILL_TOKENS: Final = 64
_DECODE_STEPS: Final = 8
_BLOCKS: Final = 4
_BUDGET_S: Final = 2.0
"""Stop measuring after this: one step of huge blocks is measurement enough."""

_BATCHES: Final = (4, 16, 64)
"""Decode rows of so many sequences in one pass: what more company costs."""

_BATCH_RUNS: Final = 3
"""Of each batch; the first pays for set-up."""

_BATCHES_BUDGET_S: Final = 1.5
"""No larger batch is begun after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Seconds that one block takes, on an otherwise idle backend."""

    decode_s_per_block: float
    """One row, one block, short context."""
    prefill_s_per_block_token: float
    """One row of a chunk of 64, one block."""
    decode_s_by_batch: tuple[tuple[int, float], ...]
    """(batch, seconds of a pass of so many sequences' rows through one block), from 1 on."""


async def measure_block_times(backend: BlockBackend) -> BlockTimes:
    """Run a short sequence, then many, through a few blocks; call it before serving. Under 5 s.

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
        await _timed(backend, [_call(facts, span, 0, 1)])
        backend.truncate(_SEQUENCE, 0)
        prefill_s = await _timed(backend, [_call(facts, span, 0, prefill_tokens)])
        decode_s: list[float] = []
        for step in range(_DECODE_STEPS):
            call = _call(facts, span, prefill_tokens + step, 1)
            decode_s.append(await _timed(backend, [call]))
            if loop.time() - start_s > _BUDGET_S:
                break
    finally:
        backend.close(_SEQUENCE)
    alone_s = median(decode_s) / len(span)
    return BlockTimes(
        decode_s_per_block=alone_s,
        prefill_s_per_block_token=prefill_s / len(span) / prefill_tokens,
        decode_s_by_batch=((1, alone_s), *await _measure_batches(backend, span)),
    )


async def _measure_batches(backend: BlockBackend, span: Span) -> list[tuple[int, float]]:
    """Passes of one row of each of many sequences, as large as cache and time allow."""
    facts, loop = backend.facts, asyncio.get_running_loop()
    start_s = loop.time()
    numbers = itertools.count(_SEQUENCE - 1, -1)
    found: list[tuple[int, float]] = []
    for batch in _BATCHES:
        if batch * facts.page_tokens > facts.cache_tokens or (
            found and (loop.time() - start_s > _BATCHES_BUDGET_S)
        ):
            break
        sequences = [SequenceId(next(numbers)) for _ in range(batch)]
        for sequence in sequences:
            backend.open(sequence, span)
        try:
            times = [
                await _timed(
                    backend, [_call(facts, span, step, 1, sequence) for sequence in sequences]
                )
                for step in range(_BATCH_RUNS)
            ]
        finally:
            for sequence in sequences:
                backend.close(sequence)
        found.append((batch, min(times[1:]) / len(span)))
    return found


def _call(
    facts: BackendFacts, span: Span, position: int, count: int, sequence: SequenceId = _SEQUENCE
) -> Call:
    rng = random.Random(position)
    values = [rng.gauss(0.0, 1.0) for _ in range(facts.hidden_size)]
    row = struct.pack(f"<{facts.hidden_size}f", *values)
    return Call(
        sequence=sequence,
        span=span,
        position=position,
        count=count,
        call_count=count,
        payload=bytearray(row * count),
        encoding="float32",
        output_encoding=facts.encodings[0],
        rows_wanted=count,
    )


async def _timed(backend: BlockBackend, calls: list[Call]) -> float:
    """Seconds of one run; making up its rows is not in them."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    for outcome in await backend.run(calls):
        if not isinstance(outcome, bytes):
            raise outcome
    return loop.time() - start_s
