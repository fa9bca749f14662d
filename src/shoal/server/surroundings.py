"""What a server that places itself sees and does: `rebalancing.Surroundings` for real.

Its eyes are the directory, its voice is its own record. Round trips are those of a few pings
to others: between strangers none can be known, so all hops count like the middle one of these.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, Protocol

from shoal.base.errors import ShoalError
from shoal.base.ids import PeerId, short
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.base.spans import Span
from shoal.discovery.directory import Snapshot
from shoal.net.address import parse_address
from shoal.net.channel import PURPOSE_CONTROL, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport
from shoal.plan.cost import RTT_UNKNOWN_S
from shoal.plan.live import Burden
from shoal.plan.rebalance import trusted, uncovered
from shoal.plan.view import Intent, SwarmView
from shoal.server.announcing import Announcer
from shoal.server.moving import SpanMover
from shoal.server.server import Server
from shoal.wire.messages import Ping

logger = logging.getLogger(__name__)

LOADING_SHARE: Final = 0.5
"""While blocks load, sessions run at about half their speed: both need the same cores."""

REPLAY_FACTOR: Final = 2.0
"""A replay takes so many times a prefill where bits are repeated (measured in bfloat16)."""

PINGED: Final = 3
"""Servers that are pinged before a decision,"""

PINGS: Final = 2
"""each so often; the faster counts."""


class Snapshots(Protocol):
    """What is needed of a directory."""

    def snapshot(self) -> Snapshot:
        """What is known now."""

    async def changed(self, version: int) -> Snapshot:
        """A snapshot whose version is not `version`; waits for one."""


class Pinger:
    """Measures round trips to other servers, over a control stream of its own."""

    def __init__(self, transport: Transport, swarm_pass: SwarmPass, rng: random.Random) -> None:
        self._transport = transport
        self._swarm_pass = swarm_pass
        self._rng = rng

    async def typical_s(self, view: SwarmView) -> float:
        """The middle one of round trips to a few servers; `RTT_UNKNOWN_S` if none answers."""
        others = [one for one in view.servers if one.peer != self._transport.peer]
        chosen = self._rng.sample(others, min(PINGED, len(others)))
        found = await asyncio.gather(*(self._ping(one.peer, one.addresses) for one in chosen))
        return median([one for one in found if one is not None] or [RTT_UNKNOWN_S])

    async def _ping(self, peer: PeerId, addresses: tuple[str, ...]) -> float | None:
        loop = asyncio.get_running_loop()
        times: list[float] = []
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                channel = await open_channel(
                    self._transport, parse_address(addresses[0]), PURPOSE_CONTROL, self._swarm_pass
                )
                try:
                    for call in range(PINGS):
                        start_s = loop.time()
                        await channel.send(Ping(call))
                        await channel.receive()
                        times.append(loop.time() - start_s)
                finally:
                    channel.close()
        except (ShoalError, TimeoutError) as error:
            logger.debug("no ping peer=%s reason=%r", short(peer), error)
            return None
        return min(times)


@dataclass(slots=True, kw_only=True)
class ServerSurroundings:
    """One running server, its record and its directory."""

    server: Server
    announcer: Announcer
    directory: Snapshots
    pinger: Pinger
    mover: SpanMover
    load_s: float
    """How long it took to load the blocks that are served."""

    def look(self) -> SwarmView:
        """All servers of our model that nobody suspects, and ourselves."""
        return self._trusted(self.directory.snapshot())

    async def hole(self) -> None:
        """Return when some block is served by nobody, and nobody loads it."""
        snapshot = self.directory.snapshot()
        while not uncovered(self._trusted(snapshot)):
            snapshot = await self.directory.changed(snapshot.version)

    def _trusted(self, snapshot: Snapshot) -> SwarmView:
        facts = self.announcer.announcement.facts
        everybody = replace(snapshot, suspects=frozenset()).view(
            facts.model, (facts.num_blocks, facts.hidden_size)
        )
        return trusted(everybody, snapshot.suspects - {self.server.peer})

    def burden(self) -> Burden:
        """What loading and replays cost those who are served now."""
        hops = list(self.server.sessions)
        if not hops:
            return Burden()
        said = self.announcer.announcement
        rows = sum(hop.settled_length for hop in hops) / len(hops)
        prefill_s = rows * said.prefill_s_per_block_token * len(said.facts.span)
        delay_s = LOADING_SHARE * self.load_s + REPLAY_FACTOR * prefill_s
        return Burden(sessions=len(hops), delay_s=delay_s)

    async def rtt_s(self) -> float:
        """Of a typical hop."""
        return await self.pinger.typical_s(self.look())

    async def say(self, intent: Intent | None) -> None:
        """Announce what we want.

        Raises:
            ConfigError: as `Announcer.announce`.
        """
        await self.announcer.want(intent)

    async def move(self, span: Span) -> bool:
        """Go there."""
        return await self.mover.move(span)
