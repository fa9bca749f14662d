"""All blocks and the head in one process on one core: `python ring_alone.py SHAPE QUANTIZE CORE`.

A worker (see workers.py): {"way", "samples", "rounds"} is answered with tokens per second. Way
`one by one` takes a sample after the other, as MDI-LLM's single node does; `one batch` takes all
in one pass. No network, no session protocol: the same engine and head as a node's and a client's.
"times" is answered with what a block and the head take: two nodes are split by it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Sequence

import torch

from random_model import saved_source
from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span
from shoal.hf.head import Head, load_head
from shoal.hf.head_batch import HeadBatch, find_head_tiles
from shoal.hf.ring_times import measure_head
from shoal.model.families import num_blocks
from shoal.model.measure import measure_block_times
from shoal.model.quantize import Quantization, quantization
from shoal.model.torch_backend import BackendConfig, load_backend
from workers import answer, requests

CACHE_TOKENS = 1 << 14
PROMPT = tuple(range(5, 13))
"""Of every sample, here and in the ring."""

SETTLE = 2
"""Tokens of each sample before the clock starts."""


class Alone:
    """One process that decodes samples."""

    def __init__(self, backend: BlockBackend, head: Head) -> None:
        self._backend = backend
        self._head = head
        self._batch = HeadBatch(head, find_head_tiles(head))
        self._numbers = itertools.count()

    async def speed(self, way: str, samples: int, rounds: int) -> float:
        """Tokens per second of all samples together, from the same length on."""
        sequences = [SequenceId(next(self._numbers)) for _ in range(samples)]
        for sequence in sequences:
            self._backend.open(sequence, self._backend.facts.span)
        try:
            rows = [await self._prefill(sequence) for sequence in sequences]
            tokens = [await self._token(row) for row in rows]
            started = 0.0
            for step in range(SETTLE + rounds):
                if step == SETTLE:
                    started = time.perf_counter()
                if way == "one batch":
                    tokens = await self._together(sequences, tokens, step)
                else:
                    for index in range(samples):
                        part = slice(index, index + 1)
                        tokens[part] = await self._together(sequences[part], tokens[part], step)
            return samples * rounds / (time.perf_counter() - started)
        finally:
            for sequence in sequences:
                self._backend.close(sequence)

    async def _together(
        self, sequences: Sequence[SequenceId], tokens: Sequence[int], step: int
    ) -> list[int]:
        calls = [
            self._call(sequence, len(PROMPT) + step, self._head.embed([token], "bfloat16"), 1)
            for sequence, token in zip(sequences, tokens, strict=True)
        ]
        rows = await self._backend.run(calls)
        return list(await asyncio.gather(*(self._token(row) for row in rows)))

    async def _prefill(self, sequence: SequenceId) -> object:
        payload = self._head.embed(PROMPT, "bfloat16")
        return (await self._backend.run([self._call(sequence, 0, payload, len(PROMPT))]))[0]

    def _call(self, sequence: SequenceId, position: int, payload: bytes, count: int) -> Call:
        return Call(
            sequence=sequence, span=self._backend.facts.span, position=position, count=count,
            call_count=count, payload=payload, encoding="bfloat16", output_encoding="bfloat16",
            rows_wanted=1,
        )  # fmt: skip

    async def _token(self, row: object) -> int:
        if not isinstance(row, bytes):
            raise SystemExit(f"a call failed: {row}")
        return int(torch.argmax(await self._batch.logits(row, "bfloat16")))


async def main(shape: str, quantize: Quantization) -> None:
    """Until stdin ends."""
    source = saved_source(shape)
    config = BackendConfig(
        model=shape, dtype="bfloat16", quantize=quantize, cache_tokens=CACHE_TOKENS
    )
    backend = load_backend(source, Span(0, num_blocks(source.config)), config)
    head = load_head(source, dtype="bfloat16")
    alone = Alone(backend, head)
    async for request in requests():
        if request == "times":
            times = await measure_block_times(backend)
            taken = await measure_head(
                HeadBatch(head, find_head_tiles(head)), head, "bfloat16", rows_max=1
            )
            answer({"decode_s_by_batch": times.decode_s_by_batch, "head_s": taken.at(1)})
        else:
            answer(await alone.speed(request["way"], request["samples"], request["rounds"]))
    await backend.aclose()


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[3])})
    torch.set_num_threads(1)
    asyncio.run(main(sys.argv[1], quantization(sys.argv[2])))
