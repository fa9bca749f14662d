"""How much faster are two small nodes than one, and what does each have to hold?

Samples go round a ring of two nodes, each on a core of its own; embedding, head and sampling run
in this process, on the first node's core, as on a starter that has blocks. Beside it one process
on one core with the same engine: a sample after the other (MDI-LLM's way on one node), and all
samples in one batch. Tokens/s of all samples together while all decode.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from model_servers import Server, connected
from random_model import SHAPES, saved_folder, saved_source
from report import RESULTS, environment, publish
from ring_alone import PROMPT
from rounds import Rounds, Way, take_rounds
from shoal.base.spans import Span
from shoal.client.client import Client
from shoal.hf.generation import Token
from shoal.hf.head import Head, load_head
from shoal.hf.head_batch import HeadBatch, find_head_tiles
from shoal.hf.ring import Ring, RingChoice, RingModel, RingReader, RingSample, open_ring
from shoal.hf.sampling import Sampler
from workers import Worker, working

SPLITS: Final = {"304m": (5, 7), "1.1b": (10, 12), "small": (3, 5)}
"""Blocks of the two nodes: those that MDI-LLM's table gives for these models, and about what the
head, which weighs a block and a half, asks for."""

SAMPLES: Final = (1, 2, 4, 12)
SETTLE: Final = 2
ROUND_S: Final = 1.5
"""About how long the clock runs in a round."""

QUICK_ROUND_S: Final = 0.3

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
        await running
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


def tokens_for(shape: str, way: str, samples: int, round_s: float) -> int:
    """Tokens of each sample that last so long where a core reads 20 GB/s."""
    token_s = {"304m": 0.03, "1.1b": 0.1, "small": 0.01}[shape]
    if way == "one by one":
        return max(3, int(round_s / token_s / samples))
    return max(8, int(round_s / token_s))


def started(shape: str, spans: Sequence[Span], stack: ExitStack, cores: int) -> list[Worker]:
    """A node for each span, on cores in turn."""
    return [
        stack.enter_context(
            working("ring_node.py", shape, f"{span.start}:{span.end}", str(index % cores),
                    threads=1)
        )
        for index, span in enumerate(spans)
    ]  # fmt: skip


def spans_of(splits: Sequence[int]) -> list[Span]:
    """One after the other, from block 0."""
    borders = [sum(splits[:index]) for index in range(len(splits) + 1)]
    return [Span(start, end) for start, end in pairwise(borders)]


async def client_of(
    shape: str, nodes: Sequence[Worker], spans: Sequence[Span], stack: AsyncExitStack
) -> Client:
    """A client of these nodes."""
    servers = [
        Server(record=await node.ask("record"), pid=node.pid, span=span)
        for node, span in zip(nodes, spans, strict=True)
    ]
    return await stack.enter_async_context(connected(shape, servers))


def model_of(head: Head) -> RingModel:
    """The head of the samples; no token ends one."""
    return RingModel(head=head, batch=HeadBatch(head, find_head_tiles(head)), encoding="bfloat16")


async def measured(
    shape: str, samples: Sequence[int], wanted: int, round_s: float
) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """Rows of the table, and all rounds."""
    spans, model = (
        spans_of(SPLITS[shape]),
        model_of(load_head(saved_source(shape), dtype="bfloat16")),
    )
    with ExitStack() as processes:
        nodes = started(shape, spans, processes, 2)
        alone = processes.enter_context(working("ring_alone.py", shape, "0", threads=1))
        async with AsyncExitStack() as stack:
            client = await client_of(shape, nodes, spans, stack)
            ways: dict[str, Way] = {}
            rings: dict[str, RingWay] = {}
            workers = {f"node {i}": node.pid for i, node in enumerate(nodes)}
            workers["starter"] = os.getpid()
            for count in samples:
                for way in ("one by one", "one batch"):
                    request = {"way": way, "samples": count,
                               "rounds": tokens_for(shape, way, count, round_s)}  # fmt: skip
                    ways[f"1 node, {way}/{count}"] = Way(
                        workers={"alone": alone.pid},
                        measure=lambda request=request: alone.ask(request),  # type: ignore[misc]
                    )
                sample = RingSample(prompt_ids=PROMPT, max_new_tokens=64, sampler=Sampler())
                ring = await open_ring(client, model, RingChoice(), [sample] * count)
                tokens = SETTLE + tokens_for(shape, "ring", count, round_s)
                one = RingWay(
                    ring=ring, nodes=nodes, samples=count, tokens_each=tokens, round_s=round_s
                )
                rings[f"2 nodes, ring/{count}"] = one
                ways[f"2 nodes, ring/{count}"] = Way(workers=workers, measure=one.measure)
            rounds = await take_rounds(ways, wanted)
    return table_of(shape, samples, rounds, rings), {
        f"{shape}, {name}": taken.details() for name, taken in rounds.items()
    }


def table_of(
    shape: str, samples: Sequence[int], rounds: dict[str, Rounds], rings: dict[str, RingWay]
) -> list[dict[str, object]]:
    """One row for each way and number of samples."""
    rows: list[dict[str, object]] = []
    for count in samples:
        for way in ("1 node, one by one", "1 node, one batch", "2 nodes, ring"):
            taken = rounds[f"{way}/{count}"]
            ring = rings.get(f"{way}/{count}")
            rows.append({
                "source": "measured", "shape": shape, "way": way, "samples": count,
                "tokens_per_s": taken.median,
                "by_one_by_one": taken.over(rounds[f"1 node, one by one/{count}"]),
                "by_one_batch": taken.over(rounds[f"1 node, one batch/{count}"]),
                "slots": ring.slots if ring else "-",
                "bubble": ring.bubble() if ring else "-",
                **taken.cells(),
            })  # fmt: skip
    return rows


def published() -> list[dict[str, object]]:
    """What MDI-LLM printed, in the same columns."""
    return [
        {"source": "published", "shape": "304m", "way": f"MDI-LLM, {nodes}", "samples": 3,
         "tokens_per_s": speed, "by_one_by_one": speed / PUBLISHED[0][1], "by_one_batch": "-",
         "slots": 3, "bubble": "-", "rounds": "-", "dropped": "-"}
        for nodes, speed in PUBLISHED
    ]  # fmt: skip


# --- memory ------------------------------------------------------------------------------


def computed_mb(shape: str, blocks: int, samples: int, tokens: int) -> tuple[float, float]:
    """Weights, and keys and values in pages of 32 positions, of a node; bfloat16."""
    sizes = SHAPES[shape]
    width, wide = sizes["hidden_size"], sizes["intermediate_size"]
    kv = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    weights = 2 * width * width + 2 * width * kv + 3 * width * wide + 2 * width
    pages = -(-tokens // 32) * 32
    return 2 * blocks * weights / 1e6, 2 * blocks * samples * pages * 2 * kv / 1e6


async def memory_of(shape: str, splits: Sequence[int]) -> list[dict[str, object]]:
    """What each node of a ring takes, by samples; measured beside computed."""
    spans, rows = spans_of(splits), []
    model = model_of(load_head(saved_source(shape), dtype="bfloat16"))
    tokens = 248
    with ExitStack() as processes:
        nodes = started(shape, spans, processes, 2)
        async with AsyncExitStack() as stack:
            client = await client_of(shape, nodes, spans, stack)
            for samples in (len(splits), 4 * len(splits)):
                sample = RingSample(
                    prompt_ids=PROMPT * 29, max_new_tokens=tokens - 29 * len(PROMPT),
                    sampler=Sampler(),
                )  # fmt: skip
                ring = await open_ring(client, model, RingChoice(), [sample] * samples)
                await ring.run([sample] * samples, RingReader())
                for index, node in enumerate(nodes):
                    look = await node.ask("look")
                    weights, cache = computed_mb(shape, splits[index], samples, tokens)
                    rows.append({
                        "shape": shape, "nodes": len(splits), "samples": samples, "node": index,
                        "blocks": splits[index], "weights_mb": weights, "cache_mb": cache,
                        "process_mb": look["empty_bytes"] / 1e6,
                        "computed_mb": weights + cache + look["empty_bytes"] / 1e6,
                        "peak_mb": look["peak_bytes"] / 1e6,
                        "over_mb": (look["peak_bytes"] - look["empty_bytes"]) / 1e6
                        - weights - cache,
                    })  # fmt: skip
    return rows


def main() -> None:
    """Tokens per second, then memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape only, 1 round")
    parser.add_argument("--shape", choices=sorted(SPLITS), help="only this one")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES, help="how many")
    parser.add_argument("--rounds", type=int, default=2, help="of each way that count")
    parser.add_argument("--only", choices=("speed", "memory"), help="leave the other out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    os.sched_setaffinity(0, {0})  # the starter's core; workers choose their own
    shapes = [options.shape] if options.shape else ["small"] if options.quick else ["304m", "1.1b"]
    for shape in shapes:
        saved_folder(shape)
    began = time.perf_counter()
    rows: list[dict[str, object]] = []
    details: dict[str, Any] = {}
    if options.only != "memory":
        for shape in shapes:
            wanted, round_s = (1, QUICK_ROUND_S) if options.quick else (options.rounds, ROUND_S)
            found, rounds = asyncio.run(measured(shape, options.samples, wanted, round_s))
            rows += found
            details |= rounds
        publish("ring", [*rows, *published()], facts, details, options.out)
    if options.only != "speed":
        splits = {"small": ((3, 5),)}.get(shapes[0], ((12,), (5, 7), (2, 5, 5)))
        memory = [row for one in splits for row in asyncio.run(memory_of(shapes[0], one))]
        print()
        publish("ring_memory", memory, facts, None, options.out)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
