"""Routing: which chain of servers a new session takes.

Prices are those of `shoal.plan.cost`: ways as a client knows them (`shoal.plan.ways`), the
decode time of the blocks that a hop runs, and the wait for room at it.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.errors import NoRouteError
from shoal.base.ids import PeerId
from shoal.base.spans import Span, missing_blocks
from shoal.plan.cost import DECODE_UNKNOWN_S, Hop, Prices, chain_s
from shoal.plan.shortest import Blemish, Leg, Task, cheapest_path
from shoal.plan.spec import DecodeTimes, Flow
from shoal.plan.view import Experience, ServerView, Stage, SwarmView
from shoal.plan.ways import ways_of

STEPS_EXPECTED: Final = 128
"""A session's wait for room is spread over so many steps: what BPRR's requests take, since
nobody knows how long an answer will be. That makes the sum of both prices WS-RR's."""

NEAR_TIE: Final = 0.05
"""Chains within 5 % of each other count as equals: measured times are no better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which servers will do."""

    numerics: str | None = None
    """Only this numerics class; None: any."""
    is_exact: bool = False
    """Only servers whose results don't depend on company."""
    encoding: str | None = None
    """Only servers that read and write this encoding; None: any."""
    inner_encoding: str | None = None
    """The same for the links between servers."""
    adapter: bytes = b""
    """Only servers that announce the adapter of this name; empty: any."""

    def allows(self, server: ServerView) -> bool:
        """Whether this server may be a hop."""
        return (
            server.state != "joining"
            and (self.numerics is None or server.numerics == self.numerics)
            and (server.is_exact or not self.is_exact)
            and (self.encoding is None or self.encoding in server.encodings)
            and (self.inner_encoding is None or self.inner_encoding in server.encodings)
            and (not self.adapter or any(name == self.adapter for _, name in server.adapters))
        )

    def __str__(self) -> str:
        words = [
            "exact" if self.is_exact else "",
            f"of numerics class {self.numerics}" if self.numerics is not None else "",
            f"that speaks {self.encoding}" if self.encoding is not None else "",
            f"and {self.inner_encoding}"
            if self.inner_encoding not in (None, self.encoding)
            else "",
            f"that has adapter {self.adapter.hex()}" if self.adapter else "",
        ]
        return " ".join(["server", *filter(None, words)])


ANY_SERVER: Final = Wanted()


def choose_chain(
    view: SwarmView,
    span: Span,
    experience: Experience,
    rng: random.Random,
    *,
    wanted: Wanted = ANY_SERVER,
    flow: Flow = "push",
) -> tuple[Stage, ...]:
    """A chain that covers `span` exactly, at a predicted cost within 5 % of the least.

    `flow` says how rows will go: pushed from server to server as a session's do, or from each
    back to the client (`hub`) as in training.

    Joining servers are never used; peers in `experience.avoid`, and after them draining
    servers, only where nobody else will do. No two adjacent stages are on one peer.
    `rng` spreads load over chains of nearly equal cost (power of two choices);
    everything else follows from the view.

    Raises:
        NoRouteError: `missing` and the text name the blocks that nobody covers.
    """
    servers = [server for server in view.servers if wanted.allows(server)]
    legs = [leg_of(server, experience) for server in servers]
    task = Task(span=span, ways=ways_of(servers, experience, flow, view.hidden_size))
    chain = power_of_two(task, legs, rng)
    if chain is None:
        raise no_route(view, missing_from([span], servers), wanted)
    return chain


def will_do(
    view: SwarmView,
    span: Span,
    chain: Sequence[Stage],
    experience: Experience,
    wanted: Wanted,
) -> bool:
    """Whether a chain that somebody else chose covers `span` with servers to be used now."""
    servers = {one.peer: one for one in view.servers if wanted.allows(one)}
    at = span.start
    for stage in chain:
        server = servers.get(stage.peer)
        if server is None or server.state != "online" or stage.peer in experience.avoid:
            return False
        if stage.span.start != at or not len(stage.span) or not server.span.covers(stage.span):
            return False
        at = stage.span.end
    return at == span.end and len(chain) > 0


def leg_of(server: ServerView, experience: Experience, numerics: str | None = None) -> Leg:
    """What it costs to make this server a hop; `numerics` is the class to prefer.

    Its passes hold a row of each of the client's sessions there, and the new one's; others'
    sessions are not known.
    """
    return Leg(
        peer=server.peer,
        span=server.span,
        blemish=Blemish(
            avoided=int(server.peer in experience.avoid) + experience.strikes.get(server.peer, 0),
            crossed=int(numerics is not None and server.numerics != numerics),
            leaving=int(server.state == "draining"),
        ),
        seconds=experience.waits_s.get(server.peer, 0.0) / STEPS_EXPECTED,
        seconds_per_block=max(
            decode_s(server, 1 + experience.sessions.get(server.peer, 0)),
            decode_s(server, 1) * experience.slowness.get(server.peer, 1.0),
        ),
    )


def decode_s(server: ServerView, batch: int) -> float:
    """Seconds of a decode pass of `batch` rows through one block, as its record tells."""
    if server.decode_s_by_batch:
        return DecodeTimes(points=server.decode_s_by_batch).at(batch)
    return server.decode_s_per_block or DECODE_UNKNOWN_S


def slowness_with_one_more(server: ServerView, slowness: float) -> float:
    """How slow a server that is so slow now will be when it has another session's rows, too.

    As if company were all that slows it: its record tells what a row more makes of such a pass.
    """
    if not server.decode_s_by_batch:
        return slowness
    times = DecodeTimes(points=server.decode_s_by_batch)
    now_s = times.at(1) * slowness * (1 + NEAR_TIE)
    batch = bisect_right(range(1, times.points[-1][0] + 1), now_s, key=times.at)
    return max(slowness, times.at(batch + 1) / times.at(1)) if times.at(1) else slowness


def decode_step_s(
    chain: Iterable[Stage], view: SwarmView, experience: Experience, flow: Flow = "push"
) -> float:
    """Predicted time of one decode step along `chain`, in seconds.

    Stages whose peer is not in the view count as unmeasured servers.
    """
    stages = tuple(chain)
    legs = {server.peer: leg_of(server, experience) for server in view.servers}
    span = Span(stages[0].span.start, stages[-1].span.end)
    return _seconds(
        stages,
        Task(span=span, ways=ways_of(view.servers, experience, flow, view.hidden_size)),
        legs,
    )


def power_of_two(task: Task, legs: Sequence[Leg], rng: random.Random) -> tuple[Stage, ...] | None:
    """The better of two nearly cheapest paths, or None when there is none.

    Each of the two is the cheapest after every leg's price was raised at random by up
    to 5 %, so that it costs at most 5 % more than the cheapest, and equals are equally
    likely: clients that decide at the same moment don't all run to the same servers.

    Raises:
        ValueError: a peer has two legs.
    """
    ordered = sorted(legs, key=lambda leg: leg.peer)
    by_peer = {leg.peer: leg for leg in ordered}
    if len(by_peer) < len(ordered):
        raise ValueError("a view must hold one server per peer")
    best: tuple[Stage, ...] | None = None
    for _ in range(2):
        path = cheapest_path(task, [_dearer(leg, 1 + NEAR_TIE * rng.random()) for leg in ordered])
        if path is None:
            return None
        if best is None or _seconds(path, task, by_peer) < _seconds(best, task, by_peer):
            best = path
    return best


def missing_from(spans: Sequence[Span], servers: Sequence[ServerView]) -> list[Span]:
    """The parts of `spans` that none of `servers` holds."""
    held = [server.span for server in servers]
    return [hole for span in spans for hole in missing_blocks(span, held)]


def no_route(view: SwarmView, missing: Sequence[Span], wanted: Wanted) -> NoRouteError:
    """The error that says which blocks no wanted server of `view` holds, and what may help."""
    blocks = " and ".join(str(span) for span in missing)
    unwanted = [server for server in view.servers if ANY_SERVER.allows(server)]
    joining = [server for server in view.servers if server.state == "joining"]
    hint = "start a server for them, or wait for one to join"
    if not missing_from(missing, unwanted):
        hint = "other servers do: relax what is asked of them"
    elif any(server.span.overlap(span) for server in joining for span in missing):
        hint = "a server that holds some is still joining: try again soon"
    return NoRouteError(
        f"no {wanted} holds blocks {blocks} ({hint})",
        missing=[(span.start, span.end) for span in missing],
    )


def _dearer(leg: Leg, factor: float) -> Leg:
    return replace(
        leg,
        seconds=leg.seconds * factor,
        seconds_per_block=leg.seconds_per_block * factor,
        factor=factor,
    )


def _seconds(chain: tuple[Stage, ...], task: Task, legs: Mapping[PeerId, Leg]) -> float:
    """The planners' price of a chain, at what ways cost here, and waits."""
    ways, peers = task.ways, [stage.peer for stage in chain]
    used = [legs.get(peer) for peer in peers]
    price = Prices(
        arrive=tuple(ways.entries(peer)[task.before] for peer in peers),
        between=tuple(tuple(ways.entries(other)[one] for other in peers) for one in peers),
        leave=tuple(ways.leave_s(peer, task.after) for peer in peers),
        block=tuple(DECODE_UNKNOWN_S if leg is None else leg.seconds_per_block for leg in used),
    )
    hops = [Hop(number, stage.span) for number, stage in enumerate(chain)]
    return chain_s(price, hops) + sum(leg.seconds for leg in used if leg is not None)
