"""Servers that place themselves, on virtual time: how long is which block nowhere served?

Real servers, gossip, records, intents and the loop that decides; toy blocks, and loading takes
as long as the scenario says. Nothing is shared between servers but the simulated network, so
each decides on what it has heard so far.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Collection
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from shoal.base.ids import PeerId
from shoal.base.spans import Span, missing_blocks
from shoal.discovery.gossip import GossipConfig, GossipDirectory
from shoal.lab.network import SimulatedNetwork
from shoal.lab.toy_backend import MODEL, ToyBackend, ToyConfig
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.net.address import Address, ListenAddress
from shoal.net.channel import PURPOSE_GOSSIP
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.memory import SCHEME, MemoryNetwork
from shoal.plan.live import LivePolicy, choose_join, swarm_of
from shoal.plan.view import ServerView
from shoal.server.announcing import Announcement, Announcer, StoreBook
from shoal.server.config import ServerConfig
from shoal.server.moving import SpanMover
from shoal.server.rebalancing import Rebalancer, RebalanceTimes
from shoal.server.refreshing import Refresher
from shoal.server.server import open_server
from shoal.server.surroundings import Pinger, ServerSurroundings
from shoal.server.switching import SwitchingBackend

SWARM: Final = "lab"

LOOK_S: Final = 0.5
"""How often coverage is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedSpec:
    """One server that places itself."""

    num_blocks: int
    """How many it hosts."""
    span: Span | None = None
    """Where it begins; None: it joins by its rule."""
    decode_s_per_block: float = 0.01
    load_s: float = 20.0
    cache_tokens: int = 1 << 13


class PlacedServer:
    """One server process with everything that `shoal serve` gives it."""

    def __init__(self, swarm: PlacedSwarm, spec: PlacedSpec, identity: Identity, name: str) -> None:
        self.spec = spec
        self.identity = identity
        self.address = Address(SCHEME, identity.peer, name, 1)
        self.rebalancer: Rebalancer | None = None
        self.backend: SwitchingBackend | None = None
        self._swarm = swarm
        self._boots = 0
        self._stack = AsyncExitStack()

    @property
    def peer(self) -> PeerId:
        """The server's identity."""
        return self.identity.peer

    @property
    def span(self) -> Span | None:
        """What new sessions get here; None while it does not serve."""
        return None if self.backend is None else self.backend.facts.span

    async def start(self, joins: tuple[Address, ...]) -> None:
        """Boot: join, load, announce, serve, place itself from then on."""
        swarm, self._stack, self._boots = self._swarm, AsyncExitStack(), self._boots + 1
        rng = random.Random(swarm.rng.random())
        transport = swarm.memory.transport(self.peer)
        self._stack.push_async_callback(transport.close)
        gossip = GossipConfig(swarm_pass=swarm.swarm_pass, joins=joins)
        directory = GossipDirectory(transport, gossip, rng)
        book = StoreBook(directory.store)
        await self._stack.enter_async_context(directory)
        span = self.spec.span or self._join(directory)
        backend = SwitchingBackend(self._toy(span))
        announcer = Announcer(self.identity, directory, self._announcement(backend))
        server = await self._stack.enter_async_context(
            open_server(
                backend,
                transport,
                swarm.swarm_pass,
                book,
                ServerConfig(services={PURPOSE_GOSSIP: directory.serve}),
            )
        )
        where = ListenAddress(SCHEME, self.address.host, self.address.port)
        await transport.listen(where, server.serve_stream)
        await announcer.announce("joining")
        await asyncio.sleep(self.spec.load_s)
        await announcer.announce("online")
        self.backend = backend
        mover = SpanMover(server, backend, self._load, announcer.moved, leave_s=30.0)
        around = ServerSurroundings(
            server=server,
            announcer=announcer,
            directory=directory,
            pinger=Pinger(transport, swarm.swarm_pass, rng),
            mover=mover,
            load_s=self.spec.load_s,
        )
        self.rebalancer = Rebalancer(swarm.policy, self.peer, around, rng, swarm.times)
        refresher = Refresher(
            announcer, lambda: server.engine.pace, lambda: directory.gossiper.coordinate
        )
        for work in (announcer.keep(), refresher.run(), self.rebalancer.run()):
            task = asyncio.ensure_future(work)
            self._stack.push_async_callback(_end, task)

    async def crash(self, detect_after_s: float | None = 0.0) -> None:
        """End without a farewell."""
        self.backend = self.rebalancer = None
        self._swarm.memory.crash(self.peer, detect_after_s=detect_after_s)
        await self._stack.aclose()

    async def stop(self) -> None:
        """End for good."""
        self.backend = None
        await self._stack.aclose()

    def _join(self, directory: GossipDirectory) -> Span:
        swarm, spec = self._swarm, self.spec
        view = directory.snapshot().view(MODEL, (swarm.num_blocks, HIDDEN_SIZE))
        newcomer = ServerView(
            peer=self.peer, addresses=(), span=Span(0, 1), cache_tokens=spec.cache_tokens
        )
        return choose_join(swarm.policy, swarm_of(view), spec.num_blocks, newcomer)

    async def _load(self, span: Span) -> ToyBackend:
        await asyncio.sleep(self.spec.load_s)
        return self._toy(span)

    def _toy(self, span: Span) -> ToyBackend:
        return ToyBackend(
            ToyConfig(
                span=span, num_blocks=self._swarm.num_blocks, cache_tokens=self.spec.cache_tokens
            )
        )

    def _announcement(self, backend: SwitchingBackend) -> Announcement:
        decode_s = self.spec.decode_s_per_block
        return Announcement(
            swarm=SWARM,
            boot_ms=self._boots,
            addresses=(str(self.address),),
            facts=backend.facts,
            decode_s_per_block=decode_s,
            prefill_s_per_block_token=decode_s / 10,
        )


@dataclass(slots=True)
class Coverage:
    """For how long how many blocks were served nowhere."""

    looked_s: float = 0.0
    uncovered_s: float = 0.0
    """While at least one block was."""
    worst: int = 0
    """The most blocks at once."""

    def look(self, num_blocks: int, spans: Collection[Span], seconds: float) -> None:
        """It was so for the last `seconds`."""
        holes = sum(map(len, missing_blocks(Span(0, num_blocks), list(spans))))
        self.looked_s += seconds
        self.uncovered_s += seconds * (holes > 0)
        self.worst = max(self.worst, holes)


@dataclass
class PlacedSwarm:
    """Servers that place themselves on one simulated network. An async context manager."""

    network: SimulatedNetwork
    rng: random.Random
    num_blocks: int
    policy: LivePolicy
    times: RebalanceTimes
    servers: list[PlacedServer] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)
    """Of the whole swarm, since it was last set."""
    sides: dict[int, tuple[list[PlacedServer], Coverage]] = field(default_factory=dict)
    """Of each side of a partition."""

    def __post_init__(self) -> None:
        self.memory = MemoryNetwork(self.network)
        self.swarm_pass = SwarmPass.open(SWARM)
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> PlacedSwarm:
        self._watching = asyncio.ensure_future(self._watch())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._watching is not None:
            await _end(self._watching)
        for server in self.servers:
            await server.stop()

    async def grow(self, *specs: PlacedSpec) -> list[PlacedServer]:
        """Start servers one after the other; each knows the first."""
        fresh = []
        for spec in specs:
            number = len(self.servers)
            identity = Identity.from_seed(self.rng.randbytes(32))
            server = PlacedServer(self, spec, identity, f"server-{number}")
            joins = (self.servers[0].address,) if self.servers else ()
            self.servers.append(server)
            await server.start(joins)
            fresh.append(server)
        return fresh

    def split(self, *sides: list[PlacedServer]) -> None:
        """Cut the network; coverage is measured for each side from now on."""
        self.network.partition(*([server.peer for server in side] for side in sides))
        self.sides = {number: (side, Coverage()) for number, side in enumerate(sides)}

    @property
    def moves(self) -> int:
        """That all living servers made so far."""
        return sum(one.rebalancer.moves for one in self.servers if one.rebalancer is not None)

    def spans(self) -> Counter[Span]:
        """What is served where."""
        return Counter(server.span for server in self.servers if server.span is not None)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.coverage.look(self.num_blocks, _spans_of(self.servers), LOOK_S)
            for side, coverage in self.sides.values():
                coverage.look(self.num_blocks, _spans_of(side), LOOK_S)


def _spans_of(servers: Collection[PlacedServer]) -> list[Span]:
    return [server.span for server in servers if server.span is not None]


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel; a failure that it had is raised.

    Raises:
        Exception: why it had ended already.
    """
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
