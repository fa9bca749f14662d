"""Who hosts which blocks of a ring: a chain of few machines, each with its own speed and memory.

A ring is as fast as its slowest stage, so the split makes that one as quick as memory allows
(water-filling, exact for contiguous spans); among equals the sum of the stages is the smallest.
Times and sizes are handed in; what happens when a node is lost is in `ring_repair`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.cost import HOP_S
from shoal.plan.spec import DecodeTimes

_EPSILON: Final = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class RingModel:
    """A model's sizes as nodes load it. `weight_bytes` and `token_bytes`: one entry per block."""

    weight_bytes: tuple[int, ...]
    token_bytes: tuple[int, ...]
    """KV cache of one position."""
    head_bytes: int
    """The head's matrix, which the starter reads for each pass."""
    row_bytes: int
    """One position's hidden states in a log."""
    cache_tokens: int
    """Positions that each node keeps, over all samples."""
    spare_bytes: int = 0
    """What loading takes besides: one tensor is there twice. docs/ring.md has the measurement."""
    keeps_blocks: bool = False
    """Whether a node that goes to other blocks keeps those that are in both spans."""

    def __post_init__(self) -> None:
        if not self.weight_bytes or len(self.weight_bytes) != len(self.token_bytes):
            raise ConfigError("a ring needs sizes for each block")

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return len(self.weight_bytes)

    def need_bytes(self, span: Span, beside: Span | None = None) -> int:
        """What a node of `span` takes besides its process: weights, full cache, full log.

        `beside`: blocks that it serves meanwhile, which are not counted.
        """
        if not len(span):
            return 0
        kept = beside if beside is not None and self.keeps_blocks else Span(0, 0)
        new = (block for block in range(span.start, span.end) if block not in kept)
        weights = sum(self.weight_bytes[block] for block in new)
        per_token = sum(self.token_bytes[span.start : span.end]) + self.row_bytes
        return weights + self.spare_bytes + per_token * self.cache_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One machine of a ring."""

    peer: PeerId
    name: str
    memory_bytes: int
    """For weights, cache and log: what the process itself takes is already off."""
    decode: DecodeTimes
    """Measured seconds of one block, by batch."""
    fixed_s: float = 0.0
    """What it does for each token besides its blocks: the starter's head."""
    num_blocks: int | None = None
    """Exactly so many; None: as the split says."""

    def stage_s(self, num_blocks: int, batch: float) -> float:
        """Seconds of its stage of one pass of `batch` rows; 0: it has none."""
        if not num_blocks:
            return self.fixed_s
        return self.fixed_s + HOP_S + num_blocks * self.decode.at(batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSplit:
    """By node, in the order of the chain: its blocks, None for a spare."""

    spans: tuple[Span | None, ...]
    stages_s: tuple[float, ...]

    @property
    def slowest_s(self) -> float:
        """Of a pass: so often can the ring turn."""
        return max(self.stages_s)


def split_ring(
    model: RingModel,
    nodes: Sequence[NodeSpec],
    *,
    batch: float = 1.0,
    keep: Sequence[Span | None] | None = None,
) -> RingSplit:
    """Blocks for each node, in the order given, so that the slowest stage is the quickest.

    `keep`: by node, blocks that have to be in its span (those that it serves now).

    Raises:
        ConfigError: the nodes' memory can't hold the model; names what each can take.
    """
    if not nodes:
        raise ConfigError("a ring needs at least one node with room for blocks")
    table = _Table(model, nodes, batch, keep or (None,) * len(nodes))
    slowest_s = table.best(math.inf, is_sum=False)
    if slowest_s == math.inf:
        raise ConfigError(_too_small(model, nodes))
    table.best(slowest_s + _EPSILON, is_sum=True)
    return _split(nodes, table.counts(), batch)


def split_by_hand(
    model: RingModel, nodes: Sequence[NodeSpec], counts: Sequence[int], *, batch: float = 1.0
) -> RingSplit:
    """The split that a person asked for.

    Raises:
        ConfigError: other numbers of nodes or blocks, or a node's memory is too small.
    """
    text = ",".join(map(str, counts))
    if len(counts) != len(nodes):
        raise ConfigError(f"--split {text}: {len(counts)} numbers for {len(nodes)} nodes")
    if min(counts) < 0 or sum(counts) != model.num_blocks:
        raise ConfigError(
            f"--split {text}: {sum(counts)} blocks in all; this model has {model.num_blocks}"
        )
    split = _split(nodes, counts, batch)
    for node, span in zip(nodes, split.spans, strict=True):
        if span is not None and model.need_bytes(span) > node.memory_bytes:
            raise ConfigError(
                f"--split {text}: {node.name} would need {_mib(model.need_bytes(span))} for blocks "
                f"{span} with their cache of {model.cache_tokens} positions, and has "
                f"{_mib(node.memory_bytes)}; give it fewer, or less --cache-tokens"
            )
    return split


def head_s(model: RingModel, decode: DecodeTimes, batch: float = 1.0) -> float:
    """What the head costs the starter per pass, judged by its blocks: both read weights."""
    mean = sum(model.weight_bytes) / model.num_blocks
    return decode.at(batch) * model.head_bytes / mean


class _Table:
    """Splits of the first blocks over the first nodes, by dynamic programming.

    `cost[node][end]`: the best for blocks [0, end) on the nodes before `node`.
    """

    def __init__(
        self,
        model: RingModel,
        nodes: Sequence[NodeSpec],
        batch: float,
        keep: Sequence[Span | None],
    ) -> None:
        self.blocks = model.num_blocks
        self.nodes = nodes
        self.keep = keep
        weights = list(accumulate(model.weight_bytes, initial=0))
        tokens = list(accumulate(model.token_bytes, initial=0))
        self._stages = [
            [node.stage_s(count, batch) for count in range(self.blocks + 1)] for node in nodes
        ]
        self._fits = [_reach(model, node.memory_bytes, weights, tokens) for node in nodes]
        self._from: list[list[int]] = []

    def best(self, limit_s: float, *, is_sum: bool) -> float:
        """The smallest slowest stage, or sum, with no stage above `limit_s`; inf: none."""
        cost = [0.0] + [math.inf] * self.blocks
        self._from = []
        for index in range(len(self.nodes)):
            after = [math.inf] * (self.blocks + 1)
            origin = [0] * (self.blocks + 1)
            for start, before in enumerate(cost):
                if before == math.inf:
                    continue
                for end in self._ends(index, start):
                    stage_s = self._stages[index][end - start]
                    total = before + stage_s if is_sum else max(before, stage_s)
                    if stage_s <= limit_s and total < after[end]:
                        after[end], origin[end] = total, start
            cost = after
            self._from.append(origin)
        return cost[self.blocks]

    def _ends(self, index: int, start: int) -> range | tuple[int, ...]:
        """Where the span of a node may end that begins at `start`."""
        keep, wanted = self.keep[index], self.nodes[index].num_blocks
        last = self._fits[index][start]
        first = start
        if keep is not None:
            if start > keep.start:
                return ()
            first = keep.end
        if wanted is not None:
            end = start + wanted
            return (end,) if first <= end <= last else ()
        return range(first, last + 1)

    def counts(self) -> list[int]:
        """Blocks of each node, of what `best` found last."""
        counts, end = [], self.blocks
        for origin in reversed(self._from):
            counts.append(end - origin[end])
            end = origin[end]
        return counts[::-1]


def _reach(
    model: RingModel, memory_bytes: int, weights: Sequence[int], tokens: Sequence[int]
) -> list[int]:
    """By first block: where a span ends at most that fits into the memory."""
    ends = []
    for start in range(model.num_blocks + 1):
        end = start
        while end < model.num_blocks:
            size = weights[end + 1] - weights[start] + model.spare_bytes
            per_token = tokens[end + 1] - tokens[start] + model.row_bytes
            if size + per_token * model.cache_tokens > memory_bytes:
                break
            end += 1
        ends.append(end)
    return ends


def _split(nodes: Sequence[NodeSpec], counts: Sequence[int], batch: float) -> RingSplit:
    spans: list[Span | None] = []
    start = 0
    for count in counts:
        spans.append(Span(start, start + count) if count else None)
        start += count
    stages = (node.stage_s(count, batch) for node, count in zip(nodes, counts, strict=True))
    return RingSplit(spans=tuple(spans), stages_s=tuple(stages))


def _too_small(model: RingModel, nodes: Sequence[NodeSpec]) -> str:
    whole = Span(0, model.num_blocks)
    each = ", ".join(f"{node.name} {_mib(node.memory_bytes)}" for node in nodes)
    together = sum(node.memory_bytes for node in nodes)
    block = max(model.need_bytes(Span(at, at + 1)) for at in range(model.num_blocks))
    return (
        f"the ring can't hold the model: its {model.num_blocks} blocks need "
        f"{_mib(model.need_bytes(whole))} with a cache of {model.cache_tokens} positions (a block "
        f"{_mib(block)}), and the nodes can take {_mib(together)}: {each}. Add nodes, or give "
        "less --cache-tokens or --quantize int8"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.0f} MiB"
