"""Repair: which chain a session goes on with after some of its hops were lost.

Living hops keep exactly their span, since a server keys a session's state by its first
block; only the gaps are filled anew. Not here: how state comes back (the hop before a
gap replays its log), and who decides that a hop is lost (the client).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.routing import (
    ANY_SERVER,
    Wanted,
    leg_of,
    missing_from,
    no_route,
    power_of_two,
)
from shoal.plan.shortest import Task
from shoal.plan.spec import Flow
from shoal.plan.view import Experience, Stage, SwarmView
from shoal.plan.ways import ways_of


def choose_repair(
    view: SwarmView,
    chain: Sequence[Stage],
    lost: frozenset[int],
    experience: Experience,
    numerics: str,
    rng: random.Random,
    *,
    wanted: Wanted = ANY_SERVER,
    flow: Flow = "push",
) -> tuple[Stage, ...]:
    """A whole new chain in which the hops of `chain` at indices `lost` are replaced.

    What is spared, the most important first:

    1. peers that were just lost or are in `experience.avoid`: used only when nobody
       else will do;
    2. living hops: they keep their span. The peer of one may also fill the gap beside it,
       as a hop of its own that is fed from its own log;
    3. servers outside the `numerics` class ("" prefers none);
    4. draining servers;
    5. the predicted time per token, within 5 %, with power of two choices.

    Pass-through stages of `chain` are dropped; `with_client_links` puts them back.
    With `wanted=Wanted(numerics=...)` other classes are refused rather than put last. How rows
    go (`flow`) is as in `choose_chain`.

    Raises:
        NoRouteError: `missing` and the text name the blocks that nobody covers.
        ValueError: `chain` is empty or not contiguous, or `lost` is not of its indices.
    """
    living, gaps = _split(chain, lost)
    servers = [server for server in view.servers if wanted.allows(server)]
    lost_peers = {chain[index].peer for index in lost} - {stage.peer for stage in living}
    experience = replace(experience, avoid=experience.avoid | lost_peers)
    legs = [leg_of(server, experience, numerics or None) for server in servers]
    task = Task(
        span=Span(chain[0].span.start, chain[-1].span.end),
        kept=living,
        ways=ways_of(view.servers, experience, flow, view.hidden_size),
    )
    repaired = power_of_two(task, legs, rng)
    if repaired is None:
        raise no_route(view, missing_from(gaps, servers), wanted)
    return repaired


def with_client_links(
    chain: Sequence[Stage], experience: Experience, client_peer: PeerId
) -> list[Stage]:
    """The chain with the client as a relay wherever two neighbours can't reach each other.

    A relay is a stage of `client_peer` over an empty span. Relays that `chain` already
    has are dropped first, so the result says only what `experience` says.
    """
    stages = [stage for stage in chain if len(stage.span)]
    linked = stages[:1]
    for before, after in pairwise(stages):
        if (before.peer, after.peer) in experience.unreachable_pairs:
            border = after.span.start
            linked.append(Stage(peer=client_peer, span=Span(border, border)))
        linked.append(after)
    return linked


def merge_neighbours(chain: Sequence[Stage], view: SwarmView) -> tuple[Stage, ...]:
    """The chain with neighbouring hops of one peer made one, where the peer holds their blocks.

    The peer must then compute the session anew there, with one cache instead of two.
    """
    spans = {server.peer: server.span for server in view.servers}
    merged: list[Stage] = []
    for stage in chain:
        before = merged[-1] if merged else None
        if before is not None and before.peer == stage.peer and len(before.span):
            whole = Span(before.span.start, stage.span.end)
            if stage.peer in spans and spans[stage.peer].covers(whole):
                merged[-1] = Stage(peer=stage.peer, span=whole)
                continue
        merged.append(stage)
    return tuple(merged)


def _split(chain: Sequence[Stage], lost: frozenset[int]) -> tuple[tuple[Stage, ...], list[Span]]:
    """The living stages, and the gaps between them, each as long as it can be."""
    if not chain or not lost <= set(range(len(chain))):
        raise ValueError(f"lost hops {sorted(lost)} are not hops of a chain of {len(chain)}")
    if any(before.span.end != after.span.start for before, after in pairwise(chain)):
        raise ValueError("the chain is not contiguous")
    living: list[Stage] = []
    gaps: list[Span] = []
    for index, stage in enumerate(chain):
        if not len(stage.span):
            continue
        if index not in lost:
            living.append(stage)
        elif gaps and gaps[-1].end == stage.span.start:
            gaps[-1] = Span(gaps[-1].start, stage.span.end)
        else:
            gaps.append(stage.span)
    return tuple(living), gaps
