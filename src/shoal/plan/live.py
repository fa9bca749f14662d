"""Placement in a swarm that runs: the rules of `petals` and `place/latency` on live records.

A server decides for itself only, from what records say: spans, measured speeds, room for
sessions. All hops count alike: to reckon with the round trips between coordinates was measured
to be no better (decision 19). Whether it may leave its blocks at all is a matter of
`shoal.plan.rebalance`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, Literal

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan import petals
from shoal.plan.cost import HOP_S, RTT_UNKNOWN_S
from shoal.plan.live_problem import SESSION_TOKENS, live_problem
from shoal.plan.petals import Hosting, block_throughputs, choose_span, server_throughput
from shoal.plan.place import latency
from shoal.plan.place.latency import Goal, SwitchCost
from shoal.plan.placement import Placement
from shoal.plan.spec import Links
from shoal.plan.view import ServerView, SwarmView

LivePolicy = Literal["petals", "latency"]
"""petals: as many rows per second for each block as for the next. latency: short answers."""

UNKNOWN_ROWS_PER_S: Final = 1.0
"""Throughput of every server while nobody has measured: then they count alike."""

SESSIONS_MAX: Final = 64
"""More sessions are not reckoned with: a decision must take milliseconds."""

HORIZON_S: Final = 600.0
"""A move must win back within this what it costs: swarms change as fast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Burden:
    """What a move costs the sessions that run here now."""

    sessions: int = 0
    delay_s: float = 0.0
    """How long each is held up: a slower server while weights load, then a replay."""


NO_BURDEN: Final = Burden()


@dataclass(frozen=True, slots=True, kw_only=True)
class Swarm:
    """The servers that a decision counts, by index, and the prices between them."""

    num_blocks: int
    servers: tuple[ServerView, ...]
    rtt_s: float = RTT_UNKNOWN_S
    """From hop to hop, whoever they are."""

    def index(self, peer: PeerId) -> int:
        """Where the peer is among them.

        Raises:
            ConfigError: nowhere.
        """
        for index, server in enumerate(self.servers):
            if server.peer == peer:
                return index
        raise ConfigError("this server is not in its own view of the swarm")


def swarm_of(
    view: SwarmView, *, rtt_s: float = RTT_UNKNOWN_S, before: tuple[int, bytes] = (0, b"")
) -> Swarm:
    """Everybody who stays, in the order of their ids.

    Who loads counts as if it served; who has decided to go counts where it will be, and so
    does who wants to and has a ticket before (ticket, peer) `before`. Who leaves the swarm
    does not count.
    """
    staying = [one for one in view.servers if one.state != "draining"]
    return Swarm(
        num_blocks=view.num_blocks,
        servers=tuple(
            sorted((_where_it_will_be(one, before) for one in staying), key=lambda one: one.peer)
        ),
        rtt_s=rtt_s,
    )


def choose_join(policy: LivePolicy, swarm: Swarm, wanted: int, newcomer: ServerView) -> Span:
    """The span for a server that can host `wanted` blocks and is not in the swarm yet.

    `newcomer` says what it is; its span does not matter. Who has not measured yet counts
    like the middle one of the others.

    Raises:
        ConfigError: more blocks than the model has, or none.
    """
    if not 1 <= wanted <= swarm.num_blocks:
        raise ConfigError(
            f"--num-blocks {wanted}: this model has {swarm.num_blocks} blocks; "
            f"ask for 1 to {swarm.num_blocks}"
        )
    if policy == "petals":
        return choose_span(block_throughputs(hostings(swarm), swarm.num_blocks), wanted)
    others = replace(swarm, servers=(*swarm.servers, replace(newcomer, span=Span(0, wanted))))
    goal, placement = goal_of(others)
    mine = len(swarm.servers)
    return latency.choose_join(goal, placement.moved(mine, None), mine, wanted)


def choose_move(
    policy: LivePolicy,
    swarm: Swarm,
    mine: int,
    rng: random.Random,
    burden: Burden = NO_BURDEN,
) -> Span | None:
    """Where the server at index `mine` should go, or None: stay.

    Only where the rule's own objective gains at once (`objective`), and enough to win back
    within `HORIZON_S` what the move costs the sessions that run here.
    """
    if policy == "petals":
        target = petals.choose_move(hostings(swarm), mine, swarm.num_blocks, rng)
        if target is None or not _is_worth_it(swarm, mine, target, burden):
            return None
        return target
    goal, placement = goal_of(swarm)
    return latency.choose_move(goal, placement, mine, _switch_cost(goal, placement, burden))


def objective(policy: LivePolicy, swarm: Swarm) -> tuple[float, ...]:
    """What a rule wants to be small; compared from the first number to the last.

    petals: the blocks' rows per second, negated, the worst block first.
    latency: uncovered blocks, sessions without a place, seconds per token.
    """
    if policy == "petals":
        return tuple(sorted(-rows for rows in _throughputs(swarm)))[::-1]
    goal, placement = goal_of(swarm)
    return tuple(map(float, goal(placement)))


def moved(swarm: Swarm, mine: int, span: Span) -> Swarm:
    """The same with one server elsewhere."""
    servers = list(swarm.servers)
    servers[mine] = replace(servers[mine], span=span)
    return replace(swarm, servers=tuple(servers))


def hostings(swarm: Swarm) -> list[Hosting]:
    """Rows per second by server; who has not measured counts like the middle one."""
    measured = [_rows_per_s(one) for one in swarm.servers if one.prefill_s_per_block_token > 0]
    unknown = median(measured) if measured else UNKNOWN_ROWS_PER_S
    return [
        Hosting(
            span=one.span,
            throughput=_rows_per_s(one) if one.prefill_s_per_block_token > 0 else unknown,
        )
        for one in swarm.servers
    ]


def goal_of(swarm: Swarm) -> tuple[Goal, Placement]:
    """Mean seconds per token of a half-full swarm, and where everybody is now.

    Every server decodes the rows of all sessions that fill half of its cache in one pass, at
    its time for that batch.
    """
    seats = sum(one.cache_tokens * len(one.span) for one in swarm.servers)
    sessions = seats // (2 * SESSION_TOKENS * max(1, swarm.num_blocks))
    problem = live_problem(
        swarm.num_blocks,
        swarm.servers,
        Links(client_rtt_s=((swarm.rtt_s,) * len(swarm.servers),), handling_s=HOP_S),
        max(1, min(SESSIONS_MAX, sessions)),
    )
    batches = [max(1.0, one.cache_tokens / (2 * SESSION_TOKENS)) for one in swarm.servers]
    goal = latency.careful_goal(problem, batch=batches)
    return goal, Placement(spans=tuple(one.span for one in swarm.servers))


def _where_it_will_be(server: ServerView, before: tuple[int, bytes]) -> ServerView:
    intent = server.intent
    if intent is None or not (intent.is_going or (intent.ticket, server.peer) < before):
        return server
    return replace(server, span=intent.span, intent=None)


def _rows_per_s(server: ServerView) -> float:
    return server_throughput(1 / server.prefill_s_per_block_token, len(server.span))


def _throughputs(swarm: Swarm) -> Sequence[float]:
    return block_throughputs(hostings(swarm), swarm.num_blocks)


def _is_worth_it(swarm: Swarm, mine: int, target: Span, burden: Burden) -> bool:
    """Whether a move by Petals' rule gains by itself, before others answer it, and enough."""
    then = moved(swarm, mine, target)
    if objective("petals", then) >= objective("petals", swarm):
        return False
    if not burden.sessions:
        return True
    before, after = min(_throughputs(swarm)), min(_throughputs(then))
    return after > 0 and (1 - before / after) * HORIZON_S >= burden.delay_s


def _switch_cost(goal: Goal, placement: Placement, burden: Burden) -> SwitchCost:
    """Sessions that run here get a token in each of the goal's seconds."""
    seconds = goal(placement).seconds
    return SwitchCost(
        reload_s=burden.delay_s,
        sessions_now=burden.sessions,
        sessions_per_s=burden.sessions / seconds if seconds else 0.0,
        horizon_s=HORIZON_S,
    )
