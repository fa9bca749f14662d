"""Times of blocks in the processes of two servers, without sessions, network and client.

`python calibration_blocks.py SHAPE START:END` is a worker (`workers`): it runs passes through its
blocks and says how long they took. A `BlockMeter` asks two: in turn, as one session does, for the
other's weights go through the same caches and a core that waits cools down; or both at once, as
they do under load, when they share the memory's rate.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from engines import Runner
from random_model import SHAPES, saved_folder, saved_source
from shoal.base.spans import Span, parse_span
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.plan.spec import DecodeTimes
from workers import Worker, answer, requests, working

BATCHES: Final = (1, 2, 4)
PROMPTS: Final = (16, 96)
CONTEXT: Final = 96
"""Tokens that decode steps find in the cache."""

PASSES: Final = 8
"""Of each kind in one sample."""

WARM: Final = 2
"""Passes of each kind that are thrown away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Seconds of one block, by server."""

    decode: tuple[DecodeTimes, ...]
    prefill_fixed_s: tuple[float, ...]
    prefill_row_s: tuple[float, ...]


Sample = dict[tuple[int, int, int], float]
"""By server, batch and rows of each sequence: seconds of one block."""


def halves(shape: str) -> tuple[Span, Span]:
    """Who serves what."""
    blocks = int(SHAPES[shape]["num_hidden_layers"])
    return Span(0, blocks // 2), Span(blocks // 2, blocks)


def block_times(samples: Sequence[Sample]) -> BlockTimes:
    """The median of each figure."""
    middle = {kind: median(one[kind] for one in samples) for kind in samples[0]}
    servers = sorted({server for server, _, _ in middle})
    short, long = PROMPTS
    prompts = [(middle[one, 1, short], middle[one, 1, long]) for one in servers]
    row_s = [max(0.0, (more - less) / (long - short)) for less, more in prompts]
    return BlockTimes(
        decode=tuple(
            DecodeTimes(points=tuple((batch, middle[one, batch, 1]) for batch in BATCHES))
            for one in servers
        ),
        prefill_fixed_s=tuple(
            max(0.0, less - row * short) for (less, _), row in zip(prompts, row_s, strict=True)
        ),
        prefill_row_s=tuple(row_s),
    )


class BlockMeter:
    """Two processes of one thread each, which share a model's blocks. Use `measuring`."""

    def __init__(self, spans: Sequence[Span], workers: Sequence[Worker]) -> None:
        self._spans = spans
        self._workers = workers

    @property
    def pids(self) -> dict[str, int]:
        """Process ids, by what they run."""
        pairs = zip(self._spans, self._workers, strict=True)
        return {f"blocks {span}": worker.pid for span, worker in pairs}

    async def sample(self, *, at_once: bool) -> Sample:
        """Some passes of every kind, in turn or at once."""
        kinds = [(batch, CONTEXT, 1) for batch in BATCHES] + [(1, 0, rows) for rows in PROMPTS]
        found: Sample = {}
        for batch, context, rows in kinds:
            passes = {"batch": batch, "context": context, "rows": rows}
            for server, taken_s in enumerate(await self._taken_s(passes, at_once)):
                found[server, batch, rows] = taken_s / len(self._spans[server])
        return found

    async def _taken_s(self, passes: dict[str, Any], at_once: bool) -> list[float]:
        if at_once:
            each = {**passes, "count": WARM + PASSES}
            all_s = await asyncio.gather(*(worker.ask(each) for worker in self._workers))
            # Who was quicker leaves the other alone at the end: that part doesn't count.
            return [median(own[WARM:-WARM]) for own in all_s]
        taken: list[list[float]] = [[] for _ in self._workers]
        for _ in range(WARM + PASSES):
            for own, worker in zip(taken, self._workers, strict=True):
                own += await worker.ask({**passes, "count": 1})
        return [median(own[WARM:]) for own in taken]


@contextmanager
def measuring(shape: str) -> Iterator[BlockMeter]:
    """The meter of a model."""
    spans = halves(shape)
    saved_folder(shape)  # before both want to write it
    texts = [f"{span.start}:{span.end}" for span in spans]
    with ExitStack() as stack:
        started = [working("calibration_blocks.py", shape, text, threads=1) for text in texts]
        yield BlockMeter(spans, [stack.enter_context(worker) for worker in started])


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
