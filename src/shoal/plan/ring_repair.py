"""What to change in a ring that runs: after a loss, or when a node is slower than planned.

Pure, over a snapshot of the nodes. A lost node's blocks go to a spare if one has room for
them; otherwise the living take them over, each keeping what it serves if that is possible, so that
few samples are replayed; otherwise everything is split anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span, missing_blocks
from shoal.plan.ring import NodeSpec, RingModel, RingSplit, split_ring
from shoal.plan.spec import DecodeTimes

GAIN_MIN: Final = 1.25
"""A new split must make the slowest stage so many times quicker: moving costs seconds, and
measured paces of a machine that does other things as well waver by a tenth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A living node as it is now."""

    spec: NodeSpec
    """Its memory is all that it may use, its present blocks included."""
    span: Span | None
    """What it serves or loads; None: a spare."""
    free_bytes: int = 0
    """What it could take beside its present blocks."""
    pace_s: float = 0.0
    """Seconds of one block in recent decode passes; 0: it had none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One node goes to other blocks."""

    peer: PeerId
    span: Span | None
    """None: it becomes a spare."""
    is_beside: bool
    """It has room to load them while the present ones serve; else it gives those up first."""


def after_loss(
    model: RingModel, nodes: Sequence[NodeView], *, batch: float = 1.0
) -> tuple[Task, ...]:
    """What the living nodes do so that all blocks are hosted again; () when they are.

    Nodes in the order of the chain, spares anywhere.

    Raises:
        ConfigError: the living can't hold the model; names the numbers.
    """
    missing = missing_blocks(
        Span(0, model.num_blocks), [one.span for one in nodes if one.span is not None]
    )
    if not missing:
        return ()
    by_spare = _by_spares(model, nodes, missing, batch)
    if by_spare is not None:
        return by_spare
    ordered = in_chain_order(nodes)
    specs = [one.spec for one in ordered]
    try:
        split = split_ring(model, specs, batch=batch, keep=[one.span for one in ordered])
    except ConfigError:
        split = split_ring(model, [_free_of_count(one) for one in specs], batch=batch)
    return tasks_of(model, ordered, split)


def better_split(model: RingModel, nodes: Sequence[NodeView]) -> tuple[RingSplit, float] | None:
    """A split by the paces that are measured now, and how many times quicker it is; None: stay.

    Only where every node with blocks has a pace; a spare counts with what it measured alone.
    """
    ordered = in_chain_order(nodes)
    if any(one.span is not None and not one.pace_s for one in ordered):
        return None
    specs = [_at_pace(one) for one in ordered]
    now_s = max(
        (spec.stage_s(len(one.span), 1.0) for one, spec in zip(ordered, specs, strict=True)
         if one.span is not None),
        default=0.0,
    )  # fmt: skip
    try:
        split = split_ring(model, specs)
    except ConfigError:
        return None
    gain = now_s / split.slowest_s if split.slowest_s else 1.0
    return (split, gain) if gain >= GAIN_MIN else None


def tasks_of(model: RingModel, nodes: Sequence[NodeView], split: RingSplit) -> tuple[Task, ...]:
    """What changes from now to a split over the same nodes in the same order."""
    return tuple(
        _task(model, node, span)
        for node, span in zip(nodes, split.spans, strict=True)
        if span != node.span
    )


def growing_first(nodes: Sequence[NodeView], tasks: Sequence[Task]) -> list[Task]:
    """Tasks in an order in which blocks are left only when others have them, as far as possible."""
    now = {one.spec.peer: one.span for one in nodes}
    left, order = list(tasks), list[Task]()
    while left:
        bare = [_bare_blocks(now, task) for task in left]
        order.append(left.pop(bare.index(min(bare))))
        now[order[-1].peer] = order[-1].span
    return order


def in_chain_order(nodes: Sequence[NodeView]) -> list[NodeView]:
    """By their blocks; spares, which have none, behind."""
    return sorted(
        nodes,
        key=lambda one: (one.span is None, one.span.start if one.span else 0, one.spec.name),
    )


def _by_spares(
    model: RingModel, nodes: Sequence[NodeView], missing: Sequence[Span], batch: float
) -> tuple[Task, ...] | None:
    """A spare for each gap, the quickest that has room; None: there are not enough."""
    spares = [one for one in nodes if one.span is None]
    tasks = []
    for gap in missing:
        able = [one for one in spares if model.need_bytes(gap) <= one.spec.memory_bytes]
        if not able:
            return None
        chosen = min(able, key=lambda one: (one.spec.stage_s(len(gap), batch), one.spec.name))
        spares.remove(chosen)
        tasks.append(_task(model, chosen, gap))
    return tuple(tasks)


def _task(model: RingModel, node: NodeView, span: Span | None) -> Task:
    has_room = span is not None and model.need_bytes(span, node.span) <= node.free_bytes
    return Task(peer=node.spec.peer, span=span, is_beside=node.span is None or has_room)


def _bare_blocks(now: Mapping[PeerId, Span | None], task: Task) -> int:
    """How many blocks nobody would have after the task that its node has now."""
    before = now[task.peer]
    if before is None:
        return 0
    held = [span for span in ({**now, task.peer: task.span}).values() if span is not None]
    return sum(map(len, missing_blocks(before, held)))


def _free_of_count(spec: NodeSpec) -> NodeSpec:
    """A number of blocks that a person asked for gives way to what is possible."""
    return replace(spec, num_blocks=None)


def _at_pace(node: NodeView) -> NodeSpec:
    if not node.pace_s:
        return node.spec
    return replace(node.spec, decode=DecodeTimes(points=((1, node.pace_s),)))
