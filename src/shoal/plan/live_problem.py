"""A swarm that runs, as a problem of planning: what records say, and where everybody is.

A session takes a number of positions of a server's cache, however many of its blocks it runs:
that is how servers count. So it is modelled as a log, and weights as one byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Final

from shoal.plan.coordinates import estimate_s
from shoal.plan.cost import DECODE_UNKNOWN_S, HOP_S
from shoal.plan.memory import CacheShape
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model
from shoal.plan.view import ServerView
from shoal.plan.ways import Place, row_bytes, rtt_between_s, trusted_rate

SESSION_TOKENS: Final = 1024
"""Positions of a session that room is reckoned for."""


def live_problem(
    num_blocks: int,
    servers: Sequence[ServerView],
    links: Links,
    sessions: int,
    session_tokens: int = SESSION_TOKENS,
    hidden_size: int = 0,
) -> Problem:
    """The servers as they are; who has not measured counts like the middle one of the others.

    Half of a session's positions are a prompt's. Sizes are in positions and rows, not bytes; with
    `hidden_size`, of a row, lines count for what servers were seen to send.
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
                uplink_bytes_per_s=_rows_per_s(one, hidden_size),
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


def _rows_per_s(server: ServerView, hidden_size: int) -> float:
    size = row_bytes(hidden_size)
    return trusted_rate(server.sent_bytes_per_s) / size if size else math.inf


def decode_times(server: ServerView, unknown_s: float = DECODE_UNKNOWN_S) -> DecodeTimes:
    """A record's decode times by batch."""
    if server.decode_s_by_batch:
        return DecodeTimes(points=server.decode_s_by_batch)
    return DecodeTimes(points=((1, server.decode_s_per_block or unknown_s),))


def known_links(places: Sequence[Place]) -> Links:
    """The links of one client, as it knows them: pushed, each within the triangle's bounds.

    Where no server says where it is, that is what a hub's chains cost, which are sooner found.
    """
    rtts = tuple(place.rtt_s for place in places)
    if all(estimate_s(place.coordinate, place.coordinate) is None for place in places):
        return Links(client_rtt_s=(rtts,), handling_s=HOP_S, prefill_handling_s=HOP_S)
    return Links(
        client_rtt_s=(rtts,),
        server_rtt_s=tuple(
            tuple(0.0 if one is other else rtt_between_s(one, other) for other in places)
            for one in places
        ),
        flow="push",
        handling_s=HOP_S,
        prefill_handling_s=HOP_S,
    )
