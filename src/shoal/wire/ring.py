"""Messages of ring streams: machines that offer themselves to a starter, and what it tells them.

A node dials and says JoinRing; the starter answers with RingModel. The node measures one block of
that model and says Measured. From then on the starter sends RingTask when the node should serve
other blocks, and the node sends a RingReport each second. A visitor sends GetRing instead.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shoal.base.limits import HOPS_MAX
from shoal.wire.fields import Block, Content, Count, Detail, Name, Peer, Seconds, WireMessage

NodeState = Literal["measuring", "spare", "loading", "online", "failed", "leaving", "lost"]
"""measuring: one block, to see how fast it is. spare: ready, without blocks. failed: it could
not take its blocks, `detail` says why. leaving: it was told to stop, and serves until others have
its blocks; it goes when it is told to serve none. lost: it has gone; only the starter says this."""

BatchTimes = Annotated[list[tuple[Count, Seconds]], msgspec.Meta(max_length=32)]


class JoinRing(WireMessage, tag=80, frozen=True):
    """A machine offers itself. [start, end): blocks that it serves already, after a link broke."""

    name: Name
    start: Block = 0
    end: Block = 0


class RingModel(WireMessage, tag=81, frozen=True):
    """What the ring runs, and how. `model` is its name as 16 bytes."""

    model: Content
    dtype: Name
    quantize: Name
    exact: Name
    cache_tokens: Count


class Measured(WireMessage, tag=82, frozen=True):
    """What a machine can do: bytes it may take for blocks and caches, and times of one block."""

    memory_bytes: Count
    decode_s_by_batch: BatchTimes
    prefill_s_per_block_token: Seconds


class RingTask(WireMessage, tag=83, frozen=True):
    """Serve blocks [start, end) from now on; `start` = `end`: none.

    `is_beside`: load them while the present ones serve; else give those up first.
    """

    task: Count
    start: Block
    end: Block
    is_beside: bool


class RingReport(WireMessage, tag=84, frozen=True):
    """How a node does. `task` is the last that it finished or failed.

    `busy_s` is engine time and `up_s` all time since the node serves; `pace_s` what a block took
    in recent decode passes (0: there were none); `free_bytes` what it could take beside its blocks.
    """

    task: Count
    state: NodeState
    start: Block = 0
    end: Block = 0
    detail: Detail = ""
    memory_bytes: Count = 0
    memory_peak_bytes: Count = 0
    free_bytes: Count = 0
    busy_s: Seconds = 0.0
    up_s: Seconds = 0.0
    iterations: Count = 0
    rows: Count = 0
    pace_s: Seconds = 0.0


class RingOver(WireMessage, tag=85, frozen=True):
    """The starter ends the ring: give up your blocks."""

    detail: Detail


class GetRing(WireMessage, tag=86, frozen=True):
    """Asks the starter how the ring does."""

    call: Count


class RingNode(WireMessage, frozen=True):
    """One node as the starter knows it; blocks [start, end), none if they are equal."""

    peer: Peer
    name: Name
    state: NodeState
    start: Block
    end: Block
    is_starter: bool
    memory_bytes: Count
    memory_peak_bytes: Count
    planned_bytes: Count
    """Weights, full cache and full log of its blocks."""
    offered_bytes: Count
    """What it may take for them."""
    busy_s: Seconds
    up_s: Seconds
    iterations: Count
    rows: Count
    pace_s: Seconds
    age_s: Seconds
    """How old its report is."""
    decode_s_by_batch: BatchTimes
    detail: Detail = ""


class RingState(WireMessage, tag=87, frozen=True):
    """All nodes, in the order of the chain, then those without blocks.

    `turn` counts how often blocks were dealt out; `proposal` is a better split, for people.
    """

    call: Count
    turn: Count
    is_up: bool
    nodes: Annotated[list[RingNode], msgspec.Meta(max_length=HOPS_MAX)]
    proposal: Detail = ""
