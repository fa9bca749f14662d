"""Who may leave its blocks for others, when servers decide alone and news takes time.

A server that wants to go says so, with a *ticket* higher than any it knows of, and waits twice
the time in which news reaches everybody (`WAIT_S`). Then it goes only if its blocks stay covered
with all those gone who hold an earlier ticket, and all who have said that they go.

Why no block is uncovered while news takes less than half of `WAIT_S`: of two servers that leave,
say A relied on B. Then A had seen B's intent, with a higher ticket, or B spoke up so late that it
knew A's intent by then, and took a higher ticket. So whoever is relied on has the higher ticket,
and the highest of all who leave relied on somebody who stays. That those who go count as gone
whatever their ticket is for news that is later than that.

Losses are no concern of this: who crashes leaves without a ticket. Where to go and whether it
pays is decided in `shoal.plan.live`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shoal.base.ids import PeerId
from shoal.base.spans import Span, missing_blocks
from shoal.plan.view import ServerView, SwarmView

CONVERGENCE_S: Final = 10.0
"""News reaches everybody within this: 4 s among 1,000 servers in the lab, suspicions 7 s."""

WAIT_S: Final = 2 * CONVERGENCE_S
"""From the announcement of an intent to the decision."""


def next_ticket(view: SwarmView) -> int:
    """A ticket higher than any that is known."""
    return 1 + max((one.intent.ticket for one in view.servers if one.intent is not None), default=0)


def trusted(view: SwarmView, suspects: frozenset[PeerId]) -> SwarmView:
    """The view without servers that somebody could not reach: they cover nothing."""
    return replace(view, servers=tuple(one for one in view.servers if one.peer not in suspects))


def uncovered(view: SwarmView) -> list[Span]:
    """The blocks that nobody serves, nor will when it has loaded or moved."""
    spans = [one.span for one in view.servers if one.state != "draining"]
    spans += [one.intent.span for one in view.servers if one.intent and one.intent.is_going]
    return missing_blocks(Span(0, view.num_blocks), spans)


def may_leave(view: SwarmView, me: PeerId, target: Span, ticket: int) -> bool:
    """Whether `me` may go to `target` with this ticket.

    `view` holds only servers that can be trusted to be there (`trusted`), `me` among them.
    While all blocks are covered, all must stay so. In a swarm that has holes already, a
    move must leave fewer of them.
    """
    mine = next(one.span for one in view.servers if one.peer == me)
    others = [one for one in view.servers if one.peer != me and one.state == "online"]
    staying = [one.span for one in others if _stays(one, me, ticket)]
    if not _holes(view.num_blocks, [mine, *(one.span for one in others)]):
        return not missing_blocks(mine, staying)
    return _holes(view.num_blocks, [*staying, target]) < _holes(view.num_blocks, [*staying, mine])


def _stays(server: ServerView, me: PeerId, ticket: int) -> bool:
    """Whether its blocks can be counted on."""
    intent = server.intent
    if intent is None:
        return True
    is_earlier = (intent.ticket, server.peer) < (ticket, me)  # of equal ones the lower id's
    return not (intent.is_going or is_earlier)


def _holes(num_blocks: int, spans: list[Span]) -> int:
    return sum(map(len, missing_blocks(Span(0, num_blocks), spans)))
