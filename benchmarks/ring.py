"""How much faster are two small nodes than one, and what does each have to hold?

Samples go round a ring of two nodes, each on a core of its own; embedding, head and sampling run
in this process, on the first node's core, as on a starter that has blocks. Beside it one process
on one core with the same engine: a sample after the other (MDI-LLM's way on one node), and all
samples in one batch. Tokens/s of all samples together while all decode. Blocks are dealt out by
what one process measured, the head counted as work of the first node; slots are chosen by trials.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from core_share import boards
from random_model import saved_folder, saved_source
from report import RESULTS, environment, publish
from ring_alone import PROMPT
from ring_parts import Case, client_of, model_of, split_of, started
from ring_size import SPLITS, memory_of
from rounds import Rounds, Way, take_rounds
from shoal.client.client import Client
from shoal.hf.generation import Token
from shoal.hf.head import load_head
from shoal.hf.ring import Ring, RingChoice, RingModel, RingReader, RingSample, open_ring
from shoal.hf.sampling import Sampler
from shoal.model.quantize import Quantization, quantization
from workers import Worker, working

ONE_BY_ONE: Final = "1 node, one by one"
ONE_BATCH: Final = "1 node, one batch"
RING: Final = "2 nodes, ring"
FLOOR: Final = "2 nodes, a model each"
"""Each core has the whole model and one sample: no ring on these two cores can be faster one by
one, as they share a memory. What it is short of twice is the machine's."""

SAMPLES: Final = (1, 2, 4, 12)
QUICK_SAMPLES: Final = (1, 2)
LARGE_KINDS: Final[tuple[Quantization, ...]] = ("none", "int4")
"""Of the 1.1B shape, unless asked for: as stored, where a pass reads weights and does little else,
and where it computes. Both cores share one memory."""

SETTLE: Final = 2
ROUND_S: Final = 1.2
"""About how long the clock runs in a round."""

QUICK_ROUND_S: Final = 0.3

TRIALS: Final = 2.5
"""A ring finds its number of slots in as many rounds' tokens, before any round."""

LOOKS: Final = 0.6
"""Nodes are looked at twice while all decode: so much of a round apart."""

PUBLISHED: Final = (("1 node", 18.2), ("2 nodes", 26.6), ("3 nodes", 32.0))
"""MDI-LLM, NanoLlama 304M, 3 samples of 800 tokens, Jetson TX2 boards: tokens/s, steady."""


@dataclass(slots=True)
class Window:
    """The time in which all samples decode, and who was busy in it."""

    samples: int
    tokens_each: int
    counts: dict[int, int] = field(default_factory=dict)
    began_s: float = 0.0
    ended_s: float = 0.0
    tokens: int = 0
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    def came(self, number: int, token: Token) -> None:
        """Count a token; the first that are too early or too late are left out."""
        self.counts[number] = self.counts.get(number, 0) + 1
        if self.began_s and not self.ended_s:
            self.tokens += 1
            if self.counts[number] >= self.tokens_each:
                self.ended_s = token.at_s
                self.closed.set()
        elif len(self.counts) == self.samples and min(self.counts.values()) >= SETTLE:
            self.began_s = self.began_s or token.at_s
            self.opened.set()

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / (self.ended_s - self.began_s)


@dataclass(slots=True)
class RingWay:
    """Rounds of one number of samples round the ring."""

    ring: Ring
    nodes: Sequence[Worker]
    samples: int
    tokens_each: int
    round_s: float
    bubbles: list[list[float]] = field(default_factory=list)
    slots: int = 0

    async def measure(self) -> float:
        """Tokens per second; bubbles of the nodes are kept."""
        window = Window(samples=self.samples, tokens_each=self.tokens_each)
        sample = RingSample(prompt_ids=PROMPT, max_new_tokens=self.tokens_each, sampler=Sampler())
        running = asyncio.ensure_future(
            self.ring.run([sample] * self.samples, RingReader(token=window.came))
        )
        await asyncio.wait(
            [running, asyncio.ensure_future(window.opened.wait())],
            return_when=asyncio.FIRST_COMPLETED,
        )
        before = [await node.ask("look") for node in self.nodes]
        self.slots = self.ring.slots.count
        try:
            async with asyncio.timeout(LOOKS * self.round_s):
                await window.closed.wait()
            is_within = False
        except TimeoutError:
            is_within = True
        after = [await node.ask("look") for node in self.nodes]
        if failed := await running:
            raise next(iter(failed.values()))
        if is_within:
            self.bubbles.append([
                1 - (late["busy_s"] - early["busy_s"]) / (late["at_s"] - early["at_s"])
                for early, late in zip(before, after, strict=True)
            ])  # fmt: skip
        return window.speed

    def bubble(self) -> str:
        """Of each node, in per cent."""
        if not self.bubbles:
            return "too short"
        return ", ".join(f"{median(one):.0%}" for one in zip(*self.bubbles, strict=True))


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table."""

    way: str
    samples: int
    slots: int | None = None
    """Of a ring; None: chosen."""

    @property
    def key(self) -> str:
        """Names its rounds."""
        return f"{self.name}/{self.samples}"

    @property
    def name(self) -> str:
        """For the table."""
        return self.way if self.slots is None else f"{self.way}, {self.slots} slots"


def lines_of(samples: Sequence[int]) -> list[Line]:
    """Rows for these numbers of samples; with two, the pipeline alone as well."""
    lines = []
    for count in samples:
        lines += [Line(way, count) for way in (ONE_BY_ONE, ONE_BATCH, RING)]
        if count == 2:
            lines += [Line(RING, count, 2), Line(FLOOR, count)]
    return lines


def tokens_for(case: Case, line: Line, round_s: float) -> int:
    """Tokens of each sample that last so long where a core reads 20 GB/s."""
    token_s = {"304m": 0.03, "1.1b": 0.09, "small": 0.01}[case.shape] / case.core_share
    if line.way in (ONE_BY_ONE, FLOOR):
        return max(3, int(round_s / token_s / line.samples))
    return max(8, int(round_s / token_s))


async def measured(
    case: Case, samples: Sequence[int], wanted: int, round_s: float
) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """Rows of the table, and all rounds."""
    lines = lines_of(samples)
    model = model_of(load_head(saved_source(case.shape), dtype="bfloat16"))
    with boards(case.core_share) as join, ExitStack() as processes:
        alone = processes.enter_context(
            working("ring_alone.py", case.shape, case.quantize, "0", threads=1)
        )
        spans = split_of(case, 2, await alone.ask("times"))
        nodes = started(case, spans, processes, 2)
        for pid, board in ((alone.pid, "alone"), (os.getpid(), "node0"), (nodes[0].pid, "node0"),
                           (nodes[1].pid, "node1")):  # fmt: skip
            join(pid, board)
        workers = {f"node {i}": node.pid for i, node in enumerate(nodes)}
        workers["starter"] = os.getpid()
        async with AsyncExitStack() as stack:
            client = await client_of(case.shape, nodes, spans, stack)
            rings: dict[str, RingWay] = {}
            ways: dict[str, Way] = {}
            for line in lines:
                if line.way == RING:
                    one = await ring_way(client, model, nodes, case, line, round_s)
                    rings[line.key] = one
                    ways[line.key] = Way(workers=workers, measure=one.measure)
                    continue
                if line.way == FLOOR:
                    second = processes.enter_context(
                        working("ring_alone.py", case.shape, case.quantize, "1", threads=1)
                    )
                    join(second.pid, "node1")
                    ways[line.key] = floor_way((alone, second), tokens_for(case, line, round_s))
                    continue
                request = {"way": line.way.partition(", ")[2], "samples": line.samples,
                           "rounds": tokens_for(case, line, round_s)}  # fmt: skip
                ways[line.key] = Way(
                    workers={"alone": alone.pid},
                    measure=lambda request=request: alone.ask(request),  # type: ignore[misc]
                )
            rounds = await take_rounds(ways, wanted)
    split = "+".join(str(len(span)) for span in spans)
    return [row_of(case, line, rounds, rings.get(line.key), split) for line in lines], {
        f"{case.name}, {name}": taken.details() for name, taken in rounds.items()
    }


def floor_way(pair: Sequence[Worker], rounds: int) -> Way:
    """Both at once, each with a sample of its own."""
    request = {"way": "one by one", "samples": 1, "rounds": 2 * rounds}

    async def measure() -> float:
        return float(sum(await asyncio.gather(*(one.ask(request) for one in pair))))

    return Way(workers={f"alone {i}": one.pid for i, one in enumerate(pair)}, measure=measure)


async def ring_way(
    client: Client,
    model: RingModel,
    nodes: Sequence[Worker],
    case: Case,
    line: Line,
    round_s: float,
) -> RingWay:
    """A ring that has found its number of slots."""
    tokens = SETTLE + tokens_for(case, line, round_s)
    sample = RingSample(prompt_ids=PROMPT, max_new_tokens=int(tokens * TRIALS), sampler=Sampler())
    ring = await open_ring(client, model, RingChoice(slots=line.slots), [sample] * line.samples)
    if line.slots is None and line.samples > 1:
        await ring.run([sample] * line.samples, RingReader())
    return RingWay(
        ring=ring, nodes=nodes, samples=line.samples, tokens_each=tokens, round_s=round_s
    )


def row_of(
    case: Case, line: Line, rounds: dict[str, Rounds], ring: RingWay | None, split: str
) -> dict[str, object]:
    """Of the table."""
    taken = rounds[line.key]
    return {
        "source": "measured", "model": case.name, "way": line.name, "samples": line.samples,
        "tokens_per_s": taken.median,
        "by_one_by_one": taken.over(rounds[Line(ONE_BY_ONE, line.samples).key]),
        "by_one_batch": taken.over(rounds[Line(ONE_BATCH, line.samples).key]),
        "split": split if ring else "-",
        "slots": ring.slots if ring else "-",
        "bubble": ring.bubble() if ring else "-",
        **taken.cells(),
    }  # fmt: skip


def published() -> list[dict[str, object]]:
    """What MDI-LLM printed, in the same columns."""
    return [
        {"source": "published", "model": "304m", "way": f"MDI-LLM, {nodes}", "samples": 3,
         "tokens_per_s": speed, "by_one_by_one": speed / PUBLISHED[0][1], "by_one_batch": "-",
         "split": "-", "slots": 3, "bubble": "-", "rounds": "-", "dropped": "-"}
        for nodes, speed in PUBLISHED
    ]  # fmt: skip


def cases_of(options: argparse.Namespace) -> list[tuple[Case, Sequence[int]]]:
    """What to measure, with how many samples."""
    if options.quick:
        return [(Case("small"), options.samples or QUICK_SAMPLES)]
    if options.shape or options.quantize or options.core_share < 1.0:
        kind = quantization(options.quantize or "none")
        case = Case(options.shape or "304m", kind, options.core_share)
        return [(case, options.samples or SAMPLES)]
    large = [(Case("1.1b", kind), options.samples or (2,)) for kind in LARGE_KINDS]
    return [(Case("304m"), options.samples or SAMPLES), *large]


def main() -> None:
    """Tokens per second, then memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape only, 1 round")
    parser.add_argument("--shape", choices=sorted(SPLITS), help="only this one")
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), help="of blocks' weights")
    parser.add_argument("--core-share", type=float, default=1.0, help="each node's (root)")
    parser.add_argument("--samples", type=int, nargs="+", help="how many")
    parser.add_argument("--rounds", type=int, default=2, help="of each way that count")
    parser.add_argument("--only", choices=("speed", "memory"), help="leave the other out")
    parser.add_argument("--name", default="ring", help="of the result's files")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    os.sched_setaffinity(0, {0})  # the starter's core; workers choose their own
    cases = cases_of(options)
    for case, _ in cases:
        saved_folder(case.shape)
    began = time.perf_counter()
    rows: list[dict[str, object]] = []
    details: dict[str, Any] = {}
    if options.only != "memory":
        wanted, round_s = (1, QUICK_ROUND_S) if options.quick else (options.rounds, ROUND_S)
        for case, samples in cases:
            found, rounds = asyncio.run(measured(case, samples, wanted, round_s))
            rows += found
            details |= rounds
        publish(options.name, [*rows, *published()], facts, details, options.out)
    if options.only != "speed":
        shape = cases[0][0].shape
        memory = [row for one in SPLITS[shape] for row in asyncio.run(memory_of(shape, one))]
        print()
        publish(f"{options.name}_memory", memory, facts, None, options.out)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
