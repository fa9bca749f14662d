"""Chains of torch backends in one process, driven without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span
from shoal.hf.head import Head
from shoal.model.rows import rows_from_bytes
from shoal.model.source import ModelSource
from shoal.model.torch_backend import BackendConfig, load_backend

T = TypeVar("T")

FIRST = SequenceId(0)


class Chain:
    """Spans of one model on backends of their own, one sequence each step."""

    def __init__(self, source: ModelSource, borders: Sequence[int], dtype: str = "float32") -> None:
        self.encoding = dtype
        self.hidden_size = int(source.config.hidden_size)
        # Exact experts sum in an order of their own; the numbers to meet are transformers'.
        config = BackendConfig(model="test", dtype=dtype, engine="per-session", exact="never")
        spans = [Span(a, b) for a, b in pairwise(borders)]
        self.backends: list[BlockBackend] = [load_backend(source, span, config) for span in spans]
        self.length = 0

    async def __aenter__(self) -> Chain:
        for backend in self.backends:
            backend.open(FIRST, backend.facts.span)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        for backend in self.backends:
            await backend.aclose()

    async def step(self, rows: bytes, sequence: SequenceId = FIRST) -> bytes:
        """All outputs of the last block for new rows."""
        row_bytes = self.hidden_size * (4 if self.encoding == "float32" else 2)
        count = len(rows) // row_bytes
        for backend in self.backends:
            call = Call(
                sequence=sequence,
                span=backend.facts.span,
                position=self.length,
                count=count,
                call_count=count,
                payload=rows,
                encoding=self.encoding,
                output_encoding=self.encoding,
                rows_wanted=count,
            )
            (outcome,) = await backend.run([call])
            if not isinstance(outcome, bytes):
                raise outcome
            rows = outcome
        self.length += count
        return rows

    def tensor(self, rows: bytes) -> torch.Tensor:
        """(S, D) float32."""
        item = 4 if self.encoding == "float32" else 2
        count = len(rows) // self.hidden_size // item
        return rows_from_bytes(rows, self.encoding, count, self.hidden_size).float()


async def greedy(chain: Chain, head: Head, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens after `prompt`."""
    rows = await chain.step(head.embed(prompt, chain.encoding, chain.length))
    tokens: list[int] = []
    while True:
        tokens.append(int(head.logits(rows, chain.encoding)[-1].argmax()))
        if len(tokens) == count:
            return tokens
        rows = await chain.step(head.embed(tokens[-1:], chain.encoding, chain.length))


def with_chain(chain: Chain, work: Callable[[Chain], Awaitable[T]]) -> T:
    """Run `work` on a chain and close it."""

    async def run() -> T:
        async with chain:
            return await work(chain)

    return asyncio.run(run())
