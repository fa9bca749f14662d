"""Lanes: parallel chains over the same blocks, for work that can be spread.

Sessions want one chain, the fastest. The micro-batches of a training step want all servers
that would otherwise idle: a second chain beside the first, where it shares no server with it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Final

from shoal.base.errors import NoRouteError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.routing import ANY_SERVER, Wanted, choose_chain
from shoal.plan.view import Experience, Stage, SwarmView


def choose_lanes(
    view: SwarmView,
    span: Span,
    experience: Experience,
    rng: random.Random,
    *,
    lanes_max: int,
    wanted: Wanted = ANY_SERVER,
) -> tuple[tuple[Stage, ...], ...]:
    """Up to `lanes_max` chains that cover `span` and share no server, the best first.

    Servers in `experience.avoid` and those that drain are used for the first one only. Rows come
    back to the client after each server, and are priced so.

    Raises:
        NoRouteError: not even one; as `choose_chain`.
    """
    first = choose_chain(view, span, experience, rng, wanted=wanted, flow="hub")
    lanes = [first]
    used = {stage.peer for stage in first} | experience.avoid
    while len(lanes) < lanes_max:
        free = tuple(
            one for one in view.servers if one.peer not in used and one.state != "draining"
        )
        try:
            more = choose_chain(
                replace(view, servers=free), span, experience, rng, wanted=wanted, flow="hub"
            )
        except NoRouteError:
            break
        lanes.append(more)
        used |= {stage.peer for stage in more}
    return tuple(lanes)


def choose_witness(
    view: SwarmView,
    stage: Stage,
    asked: frozenset[PeerId],
    rng: random.Random,
    *,
    wanted: Wanted = ANY_SERVER,
) -> Stage | None:
    """Who can compute the same as `stage`, besides those who were `asked`; None: nobody.

    Servers of the same numerics class first: their values can be compared closely.
    """
    found = [
        one
        for one in view.servers
        if one.peer not in asked
        and one.state == "online"
        and one.span.covers(stage.span)
        and wanted.allows(one)
    ]
    mine = next((one.numerics for one in view.servers if one.peer == stage.peer), "")
    found = [one for one in found if one.numerics == mine] or found
    return Stage(peer=rng.choice(found).peer, span=stage.span) if found else None


def cut_batch(lengths: tuple[int, ...], tokens_max: int) -> list[tuple[int, int]]:
    """[start, end) of the sequences of each micro-batch: whole ones, in order.

    Each holds as many as fit into `tokens_max` positions, and one that is longer alone.
    """
    cuts: list[tuple[int, int]] = []
    start, tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > start and tokens + length > tokens_max:
            cuts.append((start, index))
            start, tokens = index, 0
        tokens += length
    if lengths:
        cuts.append((start, len(lengths)))
    return cuts


MICRO_BATCHES: Final = 8
"""Of a batch that is neither small nor large."""


def micro_tokens(total: int, longest: int, *, least: int, most: int) -> int:
    """Positions of a micro-batch, so that the servers of the lanes have work most of the time.

    A chain of n servers idles for n - 1 micro-batches at both ends of a step: four for each
    of two make that a fifth or less. More of them cost more messages, and small products.
    Measured (135M model, float32, two cores, sequences of 144): of 4 sequences, parts of 288 are
    7 % faster than of 144 with one server and 5 % slower with two; of 16, eight parts of 288 do
    as well as six of up to 432, and with one server 12 % better than sixteen of 144.
    The batch alone decides: gradients are sums over micro-batches, and who cuts another way
    when a server dies or a run goes on rounds them another way.
    """
    return max(longest, min(most, max(least, -(-total // MICRO_BATCHES))))
