"""A problem's servers and clients as real ones: our code on virtual time, blocks that cost time.

Links have the problem's round trips and rates, servers its memory and speeds. A row is as
large on the wire as the model's; models without sizes (published formulas) get small rows on
links that are as much faster.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from typing import Final

from shoal.base.backend import BackendFacts
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.discovery.coordinates import to_wire
from shoal.discovery.records import DECODE_POINTS_MAX, Record, RecordState, sign_record
from shoal.discovery.static import StaticDirectory
from shoal.discovery.store import RecordStore
from shoal.lab.cost_backend import MODEL, CostBackend, CostConfig
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.lab.sim_places import settled_places
from shoal.net.address import ListenAddress
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.memory import SCHEME, MemoryNetwork
from shoal.plan.coordinates import Coordinate
from shoal.plan.placement import Placement, free_bytes
from shoal.plan.spec import Problem
from shoal.server.announcing import StoreBook
from shoal.server.config import ServerConfig
from shoal.server.moving import SpanMover
from shoal.server.quotas import Quotas
from shoal.server.server import Server, open_server
from shoal.server.switching import SwitchingBackend

SWARM: Final = "lab"

RECORD_TTL_S: Final = 600.0
PATIENCE_S: Final = 7 * 86_400.0
"""Sessions wait for a chain as long as the simulation lasts: waiting is what is measured."""

HIDDEN_SIZE_MIN: Final = 16
CACHE_TOKENS_MAX: Final = 1 << 22
"""Positions of a server whose memory has no bound."""

PAIRS_AGAIN_S: Final = 120.0
"""Clients of a hub are reminded this often that servers don't reach each other."""


def hidden_size_of(problem: Problem) -> int:
    """Values per row of fidelity C: rows in bfloat16 of the model's bytes, but some at least."""
    return max(HIDDEN_SIZE_MIN, problem.model.row_bytes // 2)


def cache_tokens_of(problem: Problem, placement: Placement, server: int) -> int:
    """Positions of KV cache over all blocks of a server, from what its weights leave."""
    span = placement.spans[server]
    if span is None:
        return 0
    tokens = problem.workload.tokens_in + problem.workload.tokens_out
    each = problem.session_bytes(span)
    free = free_bytes(problem, placement, server)
    fitting = free * tokens // each if each else CACHE_TOKENS_MAX
    return max(0, min(CACHE_TOKENS_MAX, fitting))


class LiveServer:
    """One server of the problem."""

    def __init__(self, swarm: LiveSwarm, number: int, identity: Identity) -> None:
        self.number = number
        self.backend: CostBackend | None = None
        self.server: Server | None = None
        self._swarm = swarm
        self._identity = identity
        self._boots = 0
        self._counter = 0
        self.span: Span | None = None
        self._address = ""
        self._stack = AsyncExitStack()
        self._moving: asyncio.Task[None] | None = None

    @property
    def peer(self) -> PeerId:
        """The server's identity; it keeps it."""
        return self._identity.peer

    @property
    def is_up(self) -> bool:
        """Whether its process runs."""
        return self.server is not None

    @property
    def used(self) -> float:
        """The share of its cache that holds positions."""
        if self.backend is None:
            return 0.0
        return self.backend.held_tokens / self.backend.facts.cache_tokens

    async def start(self, placement: Placement) -> None:
        """Serve the blocks that the placement gives it."""
        swarm, span = self._swarm, placement.spans[self.number]
        if span is None:
            return
        self._boots, self._counter, self.span = self._boots + 1, 0, span
        self.backend = self._make_backend(placement, span)
        self._switching = SwitchingBackend(self.backend)
        self._stack = AsyncExitStack()
        transport = swarm.memory.transport(self.peer)
        self._stack.push_async_callback(transport.close)
        self.server = await self._stack.enter_async_context(
            open_server(
                self._switching,
                transport,
                swarm.swarm_pass,
                StoreBook(RecordStore(SWARM, is_lasting=True)),
                swarm.server_config,
            )
        )
        where = ListenAddress(SCHEME, f"server{self.number}", 1)
        listener = await transport.listen(where, self.server.serve_stream)
        self._address = str(listener.address)
        self._publish("online")

    def move(self, placement: Placement) -> None:
        """Serve other blocks, as a real server moves: who runs on the old ones may leave."""
        self._moving = asyncio.get_running_loop().create_task(self._move(placement, self._moving))

    async def _move(self, placement: Placement, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        span = placement.spans[self.number]
        if self.server is None or span is None or span == self.span:
            return

        async def load(span: Span) -> CostBackend:
            self.backend = self._make_backend(placement, span)
            return self.backend

        async def announce(facts: BackendFacts) -> None:
            self.span = facts.span
            self._publish("online")

        await SpanMover(self.server, self._switching, load, announce).move(span)

    async def end_moving(self) -> None:
        """See that a move is over, its errors included.

        Raises:
            ConfigError: as SpanMover.move.
        """
        if self._moving is not None:
            self._moving.cancel()
            with suppress(asyncio.CancelledError):
                await self._moving
            self._moving = None

    def _make_backend(self, placement: Placement, span: Span) -> CostBackend:
        problem = self._swarm.problem
        return CostBackend(
            CostConfig(
                server=problem.servers[self.number],
                span=span,
                num_blocks=problem.num_blocks,
                hidden_size=hidden_size_of(problem),
                cache_tokens=cache_tokens_of(problem, placement, self.number),
                page_tokens=max(1, problem.model.page_tokens),
            )
        )

    async def stop(self) -> None:
        """Say goodbye and end; sessions are repaired elsewhere."""
        await self.end_moving()
        if self.server is not None:
            self._publish("offline")
            self.server = self.backend = self.span = None
            await self._stack.aclose()

    async def kill(self) -> None:
        """End without a farewell, as a killed process does."""
        await self.end_moving()
        if self.server is not None:
            self.server = self.backend = self.span = None
            self._swarm.memory.crash(self.peer)
            await self._stack.aclose()

    def _publish(self, state: RecordState) -> None:
        """Make it known to everybody at once, as a perfect directory would."""
        if self.backend is None or self.span is None:
            return
        facts, spec = self.backend.facts, self._swarm.problem.servers[self.number]
        self._counter += 1
        record = Record(
            peer=self.peer,
            swarm=SWARM,
            boot_ms=self._boots,
            counter=self._counter,
            ttl_s=RECORD_TTL_S,
            state=state,
            addresses=[self._address],
            model=MODEL,
            num_blocks=facts.num_blocks,
            hidden_size=facts.hidden_size,
            start=self.span.start,
            end=self.span.end,
            numerics=facts.numerics,
            is_exact=facts.is_exact,
            encodings=list(facts.encodings),
            cache_tokens=facts.cache_tokens,
            decode_s_per_block=spec.decode.at(1),
            decode_s_by_batch=list(spec.decode.points[:DECODE_POINTS_MAX]),
            prefill_s_per_block_token=spec.prefill_s_per_block_token,
            coordinate=to_wire(self._swarm.places[self.number]),
        )
        now_s = asyncio.get_running_loop().time()
        self._swarm.directory.store.accept(sign_record(self._identity, record), now_s)


class LiveSwarm:
    """All servers and clients of a problem on one simulated network. An async context manager."""

    def __init__(
        self, problem: Problem, rng: random.Random, *, server_config: ServerConfig | None = None
    ) -> None:
        self.problem = problem
        self.network = SimulatedNetwork(rng)
        self.memory = MemoryNetwork(self.network)
        self.swarm_pass = SwarmPass.open(SWARM)
        self.directory = StaticDirectory(SWARM, is_lasting=True)
        self.server_config = server_config or ServerConfig(quotas=Quotas(cache_share=1.0))
        self.servers = [
            LiveServer(self, number, Identity.from_seed(rng.randbytes(32)))
            for number in range(len(problem.servers))
        ]
        between = problem.links.server_rtt_s if problem.links.flow == "push" else None
        self.places: Sequence[Coordinate | None] = (None,) * len(self.servers)
        """Where servers say they are."""
        if between is not None:
            self.places = settled_places(between, random.Random(len(between)))
        self.clients: list[Client] = []
        self.cut: set[int] = set()
        """Servers that nobody reaches, though they run."""
        self._rng = rng
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> LiveSwarm:
        identities = [
            Identity.from_seed(self._rng.randbytes(32)) for _ in range(self.problem.num_clients)
        ]
        self._link_up([identity.peer for identity in identities])
        for identity in identities:
            self.clients.append(await self._open_client(identity))
        self._teach()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        for server in self.servers:
            await server.stop()

    def reach(self, server: int, is_reached: bool) -> None:
        """Cut a server off from everybody, or end that."""
        (self.cut.discard if is_reached else self.cut.add)(server)
        self.network.partition(*([self.servers[one].peer] for one in sorted(self.cut)))

    async def keep_hub(self) -> None:
        """Until cancelled: where clients relay, servers never get to know each other."""
        while True:
            await asyncio.sleep(PAIRS_AGAIN_S)
            self._teach()

    async def _open_client(self, identity: Identity) -> Client:
        transport = self.memory.transport(identity.peer)
        self._stack.push_async_callback(transport.close)
        config = ClientConfig(
            model=MODEL,
            num_blocks=self.problem.num_blocks,
            hidden_size=hidden_size_of(self.problem),
            patience_s=PATIENCE_S,
        )
        return await self._stack.enter_async_context(
            open_client(
                identity,
                transport,
                self.swarm_pass,
                self.directory,
                config,
                rng=random.Random(self._rng.random()),
                wall_clock=asyncio.get_running_loop().time,
            )
        )

    def _link_up(self, clients: list[PeerId]) -> None:
        """The problem's links. What a hop costs in handling comes on top of the way to it."""
        links = self.problem.links
        between = links.server_rtt_s
        for one, server in enumerate(self.servers):
            for client, peer in enumerate(clients):
                rtt_s = links.client_rtt_s[client][one]
                sent, received = self._rates(one)
                self._set(peer, server.peer, rtt_s / 2 + links.handling_s, received)
                self._set(server.peer, peer, rtt_s / 2, sent)
            for other, receiver in enumerate(self.servers):
                if other == one:
                    continue
                if links.flow == "hub":
                    self.network.forbid_dialing(server.peer, receiver.peer)
                elif between is not None:
                    rate = min(self._rates(one)[0], self._rates(other)[1])
                    delay_s = between[one][other] / 2 + links.handling_s
                    self._set(server.peer, receiver.peer, delay_s, rate)

    def _set(self, sender: PeerId, receiver: PeerId, delay_s: float, rate: float) -> None:
        conditions = LinkConditions(delay_s=delay_s, rate_bytes_per_s=rate)
        self.network.set_link(sender, receiver, conditions)

    def _rates(self, server: int) -> tuple[float, float]:
        """Bytes per second that a server sends and receives, scaled as our rows are."""
        larger = hidden_size_of(self.problem) * 2 / self.problem.model.row_bytes
        spec = self.problem.servers[server]
        return spec.sent_bytes_per_s * larger, spec.received_bytes_per_s * larger

    def _teach(self) -> None:
        """What clients would have measured by now: round trips, and pairs that don't meet."""
        links, now_s = self.problem.links, asyncio.get_running_loop().time()
        for client, rtts in zip(self.clients, links.client_rtt_s, strict=True):
            for server, rtt_s in zip(self.servers, rtts, strict=True):
                client.experience.round_trip(server.peer, rtt_s + links.handling_s)
            if links.flow == "push":
                continue
            for one in self.servers:
                for other in self.servers:
                    if one is not other:
                        client.experience.pair_failed(one.peer, other.peer, now_s)
