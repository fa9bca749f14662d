"""`shoal ring status`: the ring's nodes in a table, or as JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from shoal.base.errors import PeerUnreachable
from shoal.base.ids import peer_text
from shoal.cli.ring_file import RingFile
from shoal.client.ring import ask_ring
from shoal.net.channel import PURPOSE_RING, open_channel
from shoal.net.identity import Identity
from shoal.net.tcp import TcpTransport
from shoal.wire.ring import RingNode, RingState

_MIB = 1 << 20


async def look_at(ring: RingFile) -> RingState:
    """How the ring does, asked of its starter.

    Raises:
        PeerUnreachable: the starter does not answer.
    """
    choice = ring.choice()
    identity = Identity.generate()
    transport = TcpTransport(identity)
    try:
        channel = await open_channel(
            transport, choice.joins[0], PURPOSE_RING, choice.pass_for(identity)
        )
        try:
            return await ask_ring(channel)
        finally:
            channel.close()
    except PeerUnreachable as error:
        raise PeerUnreachable(
            f"the ring's starter does not answer ({error.detail}); is shoal ring up still running?"
        ) from error
    finally:
        await transport.close()


def show(ring: RingFile, *, as_json: bool) -> None:
    """Look once and print.

    Raises:
        PeerUnreachable: the starter does not answer.
    """
    state = asyncio.run(look_at(ring))
    if as_json:
        print(json.dumps(as_dict(state)), flush=True)
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table_of(state.nodes))
    console.print("the ring is up" if state.is_up else "not all blocks are served")
    if state.proposal:
        console.print(state.proposal, markup=False)


def as_dict(state: RingState) -> dict[str, Any]:
    """As `--json` prints it."""
    return {
        "is_up": state.is_up,
        "turn": state.turn,
        "proposal": state.proposal,
        "nodes": [_node_dict(node) for node in state.nodes],
    }


def _node_dict(node: RingNode) -> dict[str, Any]:
    names = ("name", "state", "is_starter", "memory_bytes", "memory_peak_bytes", "planned_bytes",
             "offered_bytes", "busy_s", "up_s", "iterations", "rows", "pace_s", "age_s",
             "detail")  # fmt: skip
    found = {name: getattr(node, name) for name in names}
    return {
        "peer": peer_text(node.peer),
        "blocks": [node.start, node.end],
        **found,
        "decode_s_by_batch": [list(one) for one in node.decode_s_by_batch],
    }


def table_of(nodes: Sequence[RingNode]) -> Any:
    """The nodes as a rich table. Busy is the share of all time since a node serves."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="ring", title_justify="left")
    for name in ("node", "blocks", "state", "memory", "planned", "offered", "block", "busy"):
        table.add_column(name, no_wrap=True)
    for node in nodes:
        cells = (
            node.name,
            f"[{node.start},{node.end})" if node.end > node.start else "-",
            node.state if not node.detail else f"{node.state}: {node.detail}",
            f"{node.memory_bytes / _MIB:.0f} MiB (peak {node.memory_peak_bytes / _MIB:.0f})",
            f"{node.planned_bytes / _MIB:.0f} MiB" if node.planned_bytes else "-",
            f"{node.offered_bytes / _MIB:.0f} MiB" if node.offered_bytes else "-",
            f"{block_ms(node):.2f} ms",
            f"{node.busy_s / node.up_s:.0%}" if node.up_s else "-",
        )
        table.add_row(*(escape(cell) for cell in cells))
    return table


def block_ms(node: RingNode) -> float:
    """Milliseconds of one block for one row: in recent passes, else when it was measured."""
    alone_s = node.decode_s_by_batch[0][1] if node.decode_s_by_batch else 0.0
    return 1000 * (node.pace_s or alone_s)
