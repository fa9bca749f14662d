"""Chains for a dispatcher before a swarm that runs: GCA and JFFC on what records say.

The rule is `shoal.plan.route.dispatch`; here the swarm becomes its problem, and its chains
become stages. Two things differ from the paper. Passes of more rows take longer, so chains
fill up batch by batch. And a server gets no more sessions than still pay: where a pass of
twice the rows takes nearly twice as long, who waits in the line is served no later, and those
who run are served sooner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shoal.base.ids import PeerId
from shoal.base.spans import Span, missing_blocks
from shoal.plan.cost import Chain, Hop
from shoal.plan.live_problem import SESSION_TOKENS, known_links, live_problem
from shoal.plan.placement import Placement
from shoal.plan.route.contract import Load
from shoal.plan.route.dispatch import FastestFree
from shoal.plan.routing import ANY_SERVER, Wanted, no_route
from shoal.plan.spec import DecodeTimes
from shoal.plan.view import Experience, Stage, SwarmView
from shoal.plan.ways import place_of

BATCH_MAX: Final = 64
"""Sessions that one server gets at most; `measure` looks no further."""

GAIN_MIN: Final = 1.15
"""Twice the rows in a pass must pass so many times the rows per second."""

Stages = tuple[Stage, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """The chains of a swarm as it is now."""

    peers: tuple[PeerId, ...]
    rule: FastestFree

    @property
    def seats(self) -> int:
        """Sessions that all chains hold together."""
        most = {one.chain: one.seats for one in self.rule.chains}
        return sum(most.values())

    def choose(self, running: Iterable[Stages]) -> Stages | None:
        """The fastest chain with a free seat, or None: wait until one of `running` ends."""
        counts = Counter(map(self._chain_of, running))
        load = Load(now_s=0.0, free=(), releases=(), running=counts)
        choice = self.rule(load, 0)
        if choice is None:
            return None
        return tuple(Stage(peer=self.peers[one.server], span=one.span) for one in choice.chain)

    def _chain_of(self, stages: Stages) -> Chain:
        numbers = {peer: number for number, peer in enumerate(self.peers)}
        return tuple(Hop(numbers.get(stage.peer, -1), stage.span) for stage in stages)


def compose_live(
    view: SwarmView,
    experience: Experience,
    wanted: Wanted = ANY_SERVER,
    session_tokens: int = SESSION_TOKENS,
) -> Composition:
    """The chains over all blocks for a dispatcher that knows what `experience` says.

    Sessions are expected to become `session_tokens` long. Servers in `experience.avoid` are used
    for blocks that nobody else has: were there no chains while the only server of a block is
    full, nobody would keep the line that waits for it.

    Raises:
        NoRouteError: some block is served by nobody that can be used now.
    """
    useful = [
        one
        for one in view.servers
        if wanted.allows(one) and one.state == "online" and one.cache_tokens >= session_tokens
    ]
    everything = Span(0, view.num_blocks)
    free = [one.span for one in useful if one.peer not in experience.avoid]
    needed = missing_blocks(everything, free)
    servers = [
        one
        for one in useful
        if one.peer not in experience.avoid or any(map(one.span.overlap, needed))
    ]
    missing = missing_blocks(everything, [one.span for one in servers])
    if missing:
        raise no_route(view, missing, wanted)
    links = known_links([place_of(one, experience) for one in servers])
    problem = live_problem(view.num_blocks, servers, links, 1, session_tokens, view.hidden_size)
    most = [batch_max(one.decode) for one in problem.servers]
    placement = Placement(
        spans=tuple(one.span for one in servers),
        cache_bytes=tuple(
            min(one.cache_tokens, batch * session_tokens)
            for one, batch in zip(servers, most, strict=True)
        ),
    )
    batches = _batches(max(most))
    return Composition(
        peers=tuple(one.peer for one in servers), rule=FastestFree(problem, placement, batches)
    )


def batch_max(decode: DecodeTimes) -> int:
    """How many sessions a server should run at once: as long as twice as many pay."""
    batch = 1
    while 2 * batch <= BATCH_MAX:
        if 2 * decode.at(batch) < GAIN_MIN * decode.at(2 * batch):
            break
        batch *= 2
    return batch


def _batches(most: int) -> list[int]:
    """One by one at first, then in steps of a quarter: what a session more costs changes less."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, found[-1] // 4)))
    return found
