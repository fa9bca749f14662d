"""A swarm that runs, as a problem of planning: what records say, and where everybody is.

A session takes a number of positions of a server's cache, however many of its blocks it runs:
that is how servers count. So it is modelled as a log, and weights as one byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

from shoal.plan.coordinates import Coordinate, estimate_s
from shoal.plan.cost import DECODE_UNKNOWN_S, HOP_S
from shoal.plan.memory import CacheShape
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model
from shoal.plan.view import ServerView

SESSION_TOKENS: Final = 1024
"""Positions of a session that room is reckoned for."""

PLACED_SHARE: Final = 0.5
"""With fewer servers that know where they are, all hops count alike."""


def live_problem(
    num_blocks: int,
    servers: Sequence[ServerView],
    links: Links,
    sessions: int,
    session_tokens: int = SESSION_TOKENS,
) -> Problem:
    """The servers as they are; who has not measured counts like the middle one of the others.

    Half of a session's positions are a prompt's.
    """
    decode = [one.decode_s_per_block for one in servers if one.decode_s_per_block > 0]
    unknown_s = median(decode) if decode else DECODE_UNKNOWN_S
    return Problem(
        model=uniform_model(
            num_blocks, 1, CacheShape(values_per_token=0), row_bytes=1, keeps_logs=True
        ),
        servers=tuple(
            ServerSpec(
                name=str(index),
                memory_bytes=len(one.span) + one.cache_tokens,
                decode=decode_times(one, unknown_s),
                prefill_s_per_block_token=one.prefill_s_per_block_token,
            )
            for index, one in enumerate(servers)
        ),
        links=links,
        workload=Workload(
            tokens_in=max(1, session_tokens // 2),
            tokens_out=max(1, session_tokens - session_tokens // 2),
            sessions=sessions,
        ),
    )


def decode_times(server: ServerView, unknown_s: float = DECODE_UNKNOWN_S) -> DecodeTimes:
    """A record's decode times by batch."""
    if server.decode_s_by_batch:
        return DecodeTimes(points=server.decode_s_by_batch)
    return DecodeTimes(points=((1, server.decode_s_per_block or unknown_s),))


def know_places(places: Sequence[Coordinate | None]) -> bool:
    """Whether enough servers know where they are for links to be priced one by one."""
    known = sum(estimate_s(one, one) is not None for one in places)
    return 0 < PLACED_SHARE * len(places) <= known


def between_s(
    some: Sequence[Coordinate | None], others: Sequence[Coordinate | None], unknown_s: float
) -> tuple[tuple[float, ...], ...]:
    """Round trips from each of `some` to each other; `unknown_s` where coordinates don't tell."""
    return tuple(
        tuple(
            unknown_s if estimated is None else estimated
            for estimated in (estimate_s(one, other) for other in others)
        )
        for one in some
    )


def push_links(
    places: Sequence[Coordinate | None],
    client_rtt_s: tuple[tuple[float, ...], ...],
    unknown_s: float,
) -> Links:
    """Clients' round trips as given, those between servers at `places` estimated.

    Where too few know their places chains are priced by way of the client, as it sees them.
    """
    if not know_places(places):
        return Links(client_rtt_s=client_rtt_s, handling_s=HOP_S, prefill_handling_s=HOP_S)
    return Links(
        client_rtt_s=client_rtt_s,
        server_rtt_s=between_s(places, places, unknown_s),
        flow="push",
        handling_s=HOP_S,
        prefill_handling_s=HOP_S,
    )
