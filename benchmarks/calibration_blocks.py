"""Times of blocks in the processes of two servers, without sessions, network and client.

`python calibration_blocks.py SHAPE START:END` is a worker (`workers`): it runs passes through its
blocks and says how long they took. `block_times` asks two: in turn, as one session does, for the
other's weights go through the same caches and a core that waits cools down; or both at once, as
they do under load, when they share the memory's rate. What a pass takes alone and over and over
is up to a quarter less, and says little about either.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from engines import Runner
from random_model import SHAPES, saved_folder, saved_source
from shoal.base.spans import Span, parse_span
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.plan.spec import DecodeTimes
from workers import Worker, answer, requests, working

BATCHES: Final = (1, 2, 4, 8)
PROMPTS: Final = (16, 96)
CONTEXT: Final = 96
"""Tokens that decode steps find in the cache."""

STEPS: Final = 24
WARM: Final = 3
"""Passes of each kind that are thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Seconds of one block, by server."""

    decode: tuple[DecodeTimes, ...]
    prefill_fixed_s: tuple[float, ...]
    prefill_row_s: tuple[float, ...]


def halves(shape: str) -> tuple[Span, Span]:
    """Who serves what."""
    blocks = int(SHAPES[shape]["num_hidden_layers"])
    return Span(0, blocks // 2), Span(blocks // 2, blocks)


async def block_times(shape: str, *, at_once: bool) -> BlockTimes:
    """Of two servers that share the model's blocks, a process of one thread each."""
    spans = halves(shape)
    saved_folder(shape)  # before both want to write it
    decode: list[list[tuple[int, float]]] = [[] for _ in spans]
    prompts: list[list[float]] = [[] for _ in spans]
    with ExitStack() as stack:
        texts = [f"{span.start}:{span.end}" for span in spans]
        started = [working("calibration_blocks.py", shape, text, threads=1) for text in texts]
        workers = [stack.enter_context(worker) for worker in started]
        for batch in BATCHES:
            passes = {"batch": batch, "context": CONTEXT, "rows": 1}
            for server, taken_s in enumerate(await _taken_s(workers, passes, at_once)):
                decode[server].append((batch, taken_s / len(spans[server])))
        for rows in PROMPTS:
            passes = {"batch": 1, "context": 0, "rows": rows}
            for server, taken_s in enumerate(await _taken_s(workers, passes, at_once)):
                prompts[server].append(taken_s / len(spans[server]))
    row_s = [max(0.0, (long - short) / (PROMPTS[1] - PROMPTS[0])) for short, long in prompts]
    fixed_s = [max(0.0, own[0] - row * PROMPTS[0]) for own, row in zip(prompts, row_s, strict=True)]
    return BlockTimes(
        decode=tuple(DecodeTimes(points=tuple(points)) for points in decode),
        prefill_fixed_s=tuple(fixed_s),
        prefill_row_s=tuple(row_s),
    )


async def _taken_s(workers: Sequence[Worker], passes: dict[str, Any], at_once: bool) -> list[float]:
    """By worker: the median of `STEPS` passes of this kind."""
    if at_once:
        each = {**passes, "count": WARM + STEPS}
        all_s = await asyncio.gather(*(worker.ask(each) for worker in workers))
        # Who was quicker leaves the other alone at the end: that part doesn't count.
        return [median(own[WARM : WARM + STEPS * 3 // 4]) for own in all_s]
    taken: list[list[float]] = [[] for _ in workers]
    for _ in range(WARM + STEPS):
        for own, worker in zip(taken, workers, strict=True):
            own += await worker.ask({**passes, "count": 1})
    return [median(own[WARM:]) for own in taken]


async def serve(shape: str, span: Span) -> None:
    """The worker: `batch` sequences of `context` tokens each get `rows` more, `count` times."""
    sys.setswitchinterval(0.0005)  # as servers do
    config = BackendConfig(model=shape, dtype="bfloat16", cache_tokens=1 << 15)
    passes = Passes(Runner(load_backend(saved_source(shape), span, config)))
    async for request in requests():
        kind = (request["batch"], request["context"], request["rows"])
        answer([await passes.run(*kind) for _ in range(request["count"])])


class Passes:
    """Passes of one kind after the other."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._kind: tuple[int, int, int] | None = None

    async def run(self, batch: int, context: int, rows: int) -> float:
        """Seconds of the next pass; a prompt's begins a new sequence."""
        if (batch, context, rows) != self._kind or not context:
            self._kind = (batch, context, rows)
            self._runner.open(batch)
            for number in range(batch if context else 0):
                await self._runner.pass_s([(number, context)])
        return await self._runner.pass_s([(number, rows) for number in range(batch)])


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], parse_span(sys.argv[2])))
