"""What exact mode costs: decode and replay on one backend, engine by engine.

Decode: sessions of 64 cached tokens each step once per run. Replay: a prompt of 64 tokens
and 64 decoded ones come again: as one prefill (the fastest a repair could be), and with
every call repeated, which the exact engine's promise needs. Blocks of the 1.1B
shape, some of them: no network, no head.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from random_model import SHAPES, random_source
from report import environment, publish
from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span
from shoal.model.torch_backend import BackendConfig, load_backend

ENGINES: dict[str, dict[str, Any]] = {
    "per-session": {"engine": "per-session"},
    "packed": {"engine": "batched", "exact": "never"},
    "exact": {"engine": "batched", "exact": "always"},
}
BATCHES = (1, 8, 16, 32)
PREFIX = 64


class Runner:
    """A backend and its sequences."""

    def __init__(self, backend: BlockBackend) -> None:
        self.backend = backend
        self.lengths: dict[int, int] = {}

    def open(self, count: int) -> None:
        """Fresh sequences 0 .. count - 1."""
        for number in self.lengths:
            self.backend.close(SequenceId(number))
        self.lengths = dict.fromkeys(range(count), 0)
        for number in self.lengths:
            self.backend.open(SequenceId(number), self.backend.facts.span)

    def step_s(self, runner: asyncio.Runner, work: Sequence[tuple[int, int]]) -> float:
        """Seconds of one run of (sequence, rows) calls."""
        return runner.run(self.pass_s(work))

    async def pass_s(self, work: Sequence[tuple[int, int]]) -> float:
        """The same, in a loop that runs."""
        facts = self.backend.facts
        calls = []
        for number, rows in work:
            values = torch.randn(rows, facts.hidden_size).to(torch.bfloat16)
            calls.append(
                Call(
                    sequence=SequenceId(number), span=facts.span, position=self.lengths[number],
                    count=rows, call_count=rows, encoding="bfloat16", output_encoding="bfloat16",
                    payload=values.view(torch.uint8).numpy().tobytes(), rows_wanted=1,
                )
            )  # fmt: skip
            self.lengths[number] += rows
        started = time.perf_counter()
        outcomes = await self.backend.run(calls)
        taken = time.perf_counter() - started
        for outcome in outcomes:
            if not isinstance(outcome, bytes):
                raise outcome
        return taken


def measure(backends: dict[str, Runner], steps: int) -> list[dict[str, object]]:
    """One row of the table per figure; engines take turns, so that load hits all alike."""
    rows: list[dict[str, object]] = []
    with asyncio.Runner() as loop:
        for batch in BATCHES:
            for runner in backends.values():
                runner.open(batch)
                for number in range(batch):
                    runner.step_s(loop, [(number, PREFIX)])
            taken: dict[str, list[float]] = {name: [] for name in backends}
            work = [(number, 1) for number in range(batch)]
            for _ in range(steps + 1):
                for name, runner in backends.items():
                    taken[name].append(runner.step_s(loop, work))
            speeds = {name: batch / median(times[1:]) for name, times in taken.items()}
            rows.append(_row(f"decode tokens/s, batch {batch}", speeds))
        rows.append(_row("replay as one prefill, tokens/s", _replay(backends, loop, 0)))
        rows.append(_row("replay, a call a run, tokens/s", _replay(backends, loop, 1)))
        rows.append(_row("replay, 32 calls a run, tokens/s", _replay(backends, loop, 32)))
    return rows


def _replay(
    backends: dict[str, Runner], loop: asyncio.Runner, calls_per_run: int
) -> dict[str, float]:
    """Rows/s; 0 calls per run: all rows in one call."""
    speeds: dict[str, list[float]] = {name: [] for name in backends}
    for _ in range(4):
        for name, runner in backends.items():
            runner.open(1)
            counts = [PREFIX] + [1] * PREFIX if calls_per_run else [2 * PREFIX]
            step = min(max(calls_per_run, 1), runner.backend.facts.calls_per_sequence_max)
            taken = 0.0
            for at in range(0, len(counts), step):
                work = [(0, count) for count in counts[at : at + step]]
                taken += runner.step_s(loop, work)
            speeds[name].append(2 * PREFIX / taken)
    return {name: median(values[1:]) for name, values in speeds.items()}


def _row(figure: str, values: dict[str, float]) -> dict[str, object]:
    share = values["exact"] / values["packed"]
    return {"figure": figure, **values, "exact_per_packed": share}


def main() -> None:
    """Measure bfloat16, then float32."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small shape, fewer steps")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    facts = environment()
    source = random_source(SHAPES["small" if options.quick else "1.1b"], options.blocks)
    rows: list[dict[str, object]] = []
    for dtype in ("bfloat16", "float32"):
        backends = {}
        for name, choice in ENGINES.items():
            config = BackendConfig(model="m", dtype=dtype, cache_tokens=1 << 16, **choice)
            backends[name] = Runner(load_backend(source, Span(0, options.blocks), config))
        for row in measure(backends, 10 if options.quick else 20):
            rows.append({"dtype": dtype, **row})
        for runner in backends.values():
            asyncio.run(runner.backend.aclose())
    publish("engines", rows, facts)


if __name__ == "__main__":
    main()
