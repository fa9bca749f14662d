"""Where a server goes that was told only how many blocks to host: `--num-blocks`.

The rules are `shoal.plan.live`'s; here is what they need to know when a server joins.
Whether it moves later is a matter of `moving.py`.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Final, get_args

from shoal.base.errors import ConfigError, PeerUnreachable
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.cli.joining import SwarmChoice, visit
from shoal.cli.models import OpenModel
from shoal.plan.live import LivePolicy, choose_join, swarm_of
from shoal.plan.view import ServerView, SwarmView

JITTER_S: Final = 1.0
"""Servers that a script starts together look at the swarm at different moments, spread over
this: the one that looks later sees what the others announced."""

PLACEMENTS: Final = ("fixed", *get_args(LivePolicy))

DEFAULT_POLICY: Final[LivePolicy] = "latency"
"""Of servers that are told only a number of blocks; docs/decisions/0019 says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceChoice:
    """Who says which blocks a server hosts."""

    policy: LivePolicy
    """By which rule it joins."""
    period_s: float
    """How often it looks whether to move, on average; 0: it stays where it joins."""


def parse_place(
    placement: str | None, period_s: float, *, has_span: bool, num_blocks: int | None
) -> PlaceChoice | None:
    """The options, checked; None: the blocks are given.

    Raises:
        ConfigError: an unknown rule, or options that contradict each other.
    """
    if placement is not None and placement not in PLACEMENTS:
        raise ConfigError(f"--placement {placement!r}: write {', '.join(PLACEMENTS)}")
    if not period_s >= 0:
        raise ConfigError(f"--rebalance {period_s:g}: seconds, or 0 to stay where it joins")
    if has_span and num_blocks is not None:
        raise ConfigError("--blocks and --num-blocks: give one")
    if num_blocks is None:
        if placement not in (None, "fixed"):
            raise ConfigError(
                f"--placement {placement}: the server chooses its blocks itself; say how many "
                "with --num-blocks N" + (" instead of --blocks" if has_span else "")
            )
        return None
    policy = next((one for one in get_args(LivePolicy) if one == placement), DEFAULT_POLICY)
    return PlaceChoice(policy=policy, period_s=0.0 if placement == "fixed" else period_s)


def choose_blocks(policy: LivePolicy, view: SwarmView, wanted: int, cache_tokens: int) -> Span:
    """The span for a newcomer of unknown speed that can host `wanted` blocks.

    Raises:
        ConfigError: more blocks than the model has, or none.
    """
    newcomer = ServerView(
        peer=PeerId(b""), addresses=(), span=Span(0, wanted), cache_tokens=cache_tokens
    )
    return choose_join(policy, swarm_of(view), wanted, newcomer)


async def find_place(
    swarm: SwarmChoice,
    model: OpenModel,
    policy: LivePolicy,
    wanted: int,
    cache_tokens: int,
    rng: random.Random,
) -> Span:
    """Look at the swarm and choose; without anybody to join or find, the first blocks.

    Raises:
        ConfigError: the model has fewer blocks.
        PeerUnreachable: none of the joins answers.
    """
    empty = SwarmView(model=model.name, num_blocks=model.num_blocks, hidden_size=model.hidden_size)
    alone = choose_blocks(policy, empty, wanted, cache_tokens)
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
    return choose_blocks(policy, view, wanted, cache_tokens)
