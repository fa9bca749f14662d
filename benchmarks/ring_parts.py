"""What the benchmarks of rings share: nodes as processes, a client of them, splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from model_servers import Server, connected
from random_model import saved_source
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.cli.ring_sizes import ring_sizes
from shoal.client.client import Client
from shoal.hf.head import Head
from shoal.hf.head_batch import HeadBatch, find_head_tiles
from shoal.hf.ring import RingModel
from shoal.model.quantize import Quantization
from shoal.plan.ring import NodeSpec, split_ring
from shoal.plan.spec import DecodeTimes
from workers import Worker, working

ENOUGH_BYTES: Final = 1 << 50


@dataclass(frozen=True, slots=True)
class Case:
    """A model's shape, and how its blocks' weights are kept."""

    shape: str
    quantize: Quantization = "none"
    core_share: float = 1.0
    """Of a core that each node may use."""

    @property
    def name(self) -> str:
        """For tables."""
        name = self.shape if self.quantize == "none" else f"{self.shape} {self.quantize}"
        return name if self.core_share >= 1.0 else f"{name}, {self.core_share:g} of a core"


def split_of(case: Case, nodes: int, times: Mapping[str, Any]) -> list[Span]:
    """Blocks of equal nodes, the first with the head, as a starter deals them out.

    `times`: what ring_alone.py measured.
    """
    sizes = ring_sizes(saved_source(case.shape).config, "bfloat16", case.quantize, 1)
    decode = DecodeTimes(points=tuple((rows, s) for rows, s in times["decode_s_by_batch"]))
    specs = [
        NodeSpec(
            peer=PeerId(bytes([index]) * 32), name=f"node {index}", memory_bytes=ENOUGH_BYTES,
            decode=decode, fixed_s=0.0 if index else times["head_s"],
        )
        for index in range(nodes)
    ]  # fmt: skip
    return [span for span in split_ring(sizes, specs).spans if span is not None]


def started(case: Case, spans: Sequence[Span], stack: ExitStack, cores: int) -> list[Worker]:
    """A node for each span, on cores in turn."""
    return [
        stack.enter_context(
            working("ring_node.py", case.shape, case.quantize, f"{span.start}:{span.end}",
                    str(index % cores), threads=1)
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
