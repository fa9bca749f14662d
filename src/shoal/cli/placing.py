"""Where a server goes that was told only how many blocks to host: `--num-blocks`.

The rule is Petals' published one (`shoal.plan.petals`): the window whose worst block is
served least. Here is what it needs to know, from the records of the swarm.
"""

from __future__ import annotations

import asyncio
import random
from statistics import median
from typing import Final

from shoal.base.errors import ConfigError, PeerUnreachable
from shoal.base.spans import Span
from shoal.cli.joining import SwarmChoice, visit
from shoal.cli.models import OpenModel
from shoal.plan.petals import Hosting, block_throughputs, choose_span, server_throughput
from shoal.plan.view import ServerView, SwarmView

JITTER_S: Final = 1.0
"""Servers that a script starts together look at the swarm at different moments, spread over
this: the one that looks later sees what the others announced."""

UNKNOWN_ROWS_PER_S: Final = 1.0
"""Throughput of every server while nobody has measured: then they count alike."""


def choose_blocks(view: SwarmView, num_blocks: int, wanted: int) -> Span:
    """The span for a server that can host `wanted` of the model's `num_blocks` blocks.

    Servers that still load count as if they served; those that leave do not. Who has not
    measured yet counts like the middle one of the others.

    Raises:
        ConfigError: more blocks than the model has, or none.
    """
    if not 1 <= wanted <= num_blocks:
        raise ConfigError(
            f"--num-blocks {wanted}: this model has {num_blocks} blocks; ask for 1 to {num_blocks}"
        )
    staying = [server for server in view.servers if server.state != "draining"]
    measured = [_rows_per_s(server) for server in staying if server.prefill_s_per_block_token > 0]
    unknown = median(measured) if measured else UNKNOWN_ROWS_PER_S
    hostings = [
        Hosting(
            span=server.span,
            throughput=_rows_per_s(server) if server.prefill_s_per_block_token > 0 else unknown,
        )
        for server in staying
    ]
    return choose_span(block_throughputs(hostings, num_blocks), wanted)


async def find_place(swarm: SwarmChoice, model: OpenModel, wanted: int, rng: random.Random) -> Span:
    """Look at the swarm and choose; without anybody to join or find, the first blocks.

    Raises:
        ConfigError: the model has fewer blocks.
        PeerUnreachable: none of the joins answers.
    """
    empty = SwarmView(model=model.name, num_blocks=model.num_blocks, hidden_size=model.hidden_size)
    alone = choose_blocks(empty, model.num_blocks, wanted)
    if not swarm.joins and not swarm.is_lan:
        return alone
    await asyncio.sleep(rng.uniform(0, JITTER_S))
    try:
        async with visit(swarm) as visitor:
            shape = (model.num_blocks, model.hidden_size)
            view = visitor.directory.snapshot().view(model.name, shape)
    except PeerUnreachable:
        if swarm.joins:
            raise
        return alone  # nobody in the local network yet: we are the first
    return choose_blocks(view, model.num_blocks, wanted)


def _rows_per_s(server: ServerView) -> float:
    return server_throughput(1 / server.prefill_s_per_block_token, len(server.span))
