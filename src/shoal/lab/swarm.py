"""A whole swarm on virtual time: real servers and clients, toy blocks, a simulated network."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from shoal.base.adapters import AdapterPart
from shoal.base.backend import BackendFacts, Call
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.base.training import PassWork
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.client.head_service import HeadLimits, HeadService
from shoal.client.tending import TendConfig
from shoal.client.thin import ThinClient, ThinConfig, open_thin_client
from shoal.discovery.records import Adapter, Record, sign_record
from shoal.discovery.static import StaticDirectory
from shoal.discovery.store import RecordStore
from shoal.lab.network import SimulatedNetwork
from shoal.lab.toy_backend import MODEL, FaultChoice, ToyBackend, ToyConfig, ToyFault
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.lab.toy_head import VOCABULARY, ToyHead
from shoal.lab.training import ToyTrainer, TrainingFault
from shoal.net.address import ListenAddress
from shoal.net.channel import PURPOSE_HEAD
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.memory import SCHEME, MemoryNetwork
from shoal.server.announcing import StoreBook
from shoal.server.config import ServerConfig
from shoal.server.events import Began, Event, Recorder
from shoal.server.moving import LEAVE_S, SpanMover
from shoal.server.quotas import Quotas
from shoal.server.recording import RecordedServer, began
from shoal.server.server import Server, ServerMaker, open_server
from shoal.server.switching import SwitchingBackend

SWARM = "lab"
RECORD_TTL_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """One server of a simulated swarm."""

    name: str
    span: Span
    cache_tokens: int = 1 << 14
    iteration_s: float = 0.002
    """How long one engine iteration takes, whatever is in it."""
    token_s: float = 0.0005
    """How much longer each of its rows makes it."""
    coarse_truncate: int = 1
    is_late: bool = False
    """Does not start with the swarm; `SimulatedServer.start` starts it."""
    head: str = ""
    """Numerics class of the toy head that it runs for thin clients; empty: none."""
    adapters: tuple[tuple[str, AdapterPart], ...] = ()
    """Adapters of its own, by label."""


class Fuse:
    """A recorder that can be cut off: a server that crashes doesn't record its end."""

    def __init__(self, recorder: Recorder) -> None:
        self.is_blown = False
        self._recorder = recorder

    def record(self, event: Event) -> None:
        """Hand the event on."""
        if not self.is_blown:
            self._recorder.record(event)


class SimulatedServer:
    """One server process: it can crash, hang, crawl and come back under its identity."""

    def __init__(self, swarm: SimulatedSwarm, spec: ServerSpec, identity: Identity) -> None:
        self.spec = spec
        self.identity = identity
        self.slowness = 1.0
        self.fault: FaultChoice | None = None
        self.training_fault: Callable[[PassWork, int], TrainingFault | None] | None = None
        self.server: Server | None = None
        self.backend: ToyBackend | None = None
        self.heads: HeadService | None = None
        self._head_peer: PeerId | None = None
        self.head_limits: HeadLimits | None = None
        """Of the next start."""
        self._swarm = swarm
        self._boots = 0
        self._address = ""
        self._fuse: Fuse | None = None
        self._hung = asyncio.Event()
        self._hung.set()
        self._stack = AsyncExitStack()

    @property
    def peer(self) -> PeerId:
        """The server's identity."""
        return self.identity.peer

    @property
    def is_up(self) -> bool:
        """Whether its process runs."""
        return self.server is not None

    async def start(self) -> None:
        """Boot: empty caches, a new record, the same identity and address."""
        self._boots += 1
        self._hung.set()
        self._stack = AsyncExitStack()
        self.backend = self._toy(self.spec.span)
        self._switching = SwitchingBackend(self.backend)
        transport = self._swarm.memory.transport(self.peer)
        self._stack.push_async_callback(transport.close)
        config = self._swarm.server_config
        if self.spec.head:
            config = await self._with_head(config)
        self.server = await self._stack.enter_async_context(
            open_server(
                self._switching,
                transport,
                self._swarm.swarm_pass,
                StoreBook(RecordStore(SWARM)),
                config,
                make=self._maker(self.backend.facts),
            )
        )
        for label, part in self.spec.adapters:
            await self.server.adapters.add_own(label, part)
        where = ListenAddress(SCHEME, self.spec.name, 1)
        listener = await transport.listen(where, self.server.serve_stream)
        self._address = str(listener.address)
        self._swarm.publish(self, self._address, self._boots)

    def announce(self) -> None:
        """A newer record, as a server announces itself again from time to time."""
        self._boots += 1
        self._swarm.publish(self, self._address, self._boots)

    async def _with_head(self, config: ServerConfig) -> ServerConfig:
        """With a service for thin clients, which is a client of the swarm."""
        client = await self._stack.enter_async_context(self._swarm.new_client())
        self._head_peer = client.me
        self.heads = HeadService(ToyHead(self.spec.head), client.open_session, self.head_limits)
        return replace(config, services={**config.services, PURPOSE_HEAD: self.heads.serve})

    async def move(
        self, span: Span, *, load_s: float = 1.0, leave_s: float = LEAVE_S,
        fault: Exception | None = None, page_tokens: int = 16,
    ) -> bool:  # fmt: skip
        """Go to other blocks while serving; False: refused. `fault`: loading fails with it.

        Raises:
            RuntimeError: it is not up.
        """
        if self.server is None:
            raise RuntimeError(f"{self.spec.name} is not up")
        backend: list[ToyBackend] = []

        async def load(span: Span) -> ToyBackend:
            await asyncio.sleep(load_s)
            if fault is not None:
                raise fault
            backend.append(self._toy(span, page_tokens))
            return backend[0]

        async def announce(facts: BackendFacts) -> None:
            self.spec, self.backend = replace(self.spec, span=facts.span), backend[0]
            self.announce()

        mover = SpanMover(self.server, self._switching, load, announce, leave_s=leave_s)
        return await mover.move(span)

    def _toy(self, span: Span, page_tokens: int = 16) -> ToyBackend:
        config = ToyConfig(
            span=span,
            page_tokens=page_tokens,
            num_blocks=self._swarm.num_blocks,
            cache_tokens=self.spec.cache_tokens,
            coarse_truncate=self.spec.coarse_truncate,
            mixes_call_shape=self._swarm.mixes_call_shape,
        )
        backend = ToyBackend(config, pace=self._pace, fault=self._choose_fault)
        backend.training = ToyTrainer(
            lambda: backend.facts, pace=self._step, fault=self._choose_training_fault
        )
        return backend

    def _maker(self, facts: BackendFacts) -> ServerMaker:
        record, config = self._swarm.record, self._swarm.server_config
        if record is None:
            return Server
        now_s = asyncio.get_running_loop().time()
        self._fuse = Fuse(record(began(self.peer, facts, config, now_s)))
        return partial(RecordedServer, recorder=self._fuse)

    async def crash(self, detect_after_s: float | None = 0.0) -> None:
        """End without a farewell; `detect_after_s` as in MemoryNetwork.crash."""
        if self.server is None:
            return
        self.server, self.backend = None, None
        if self._fuse is not None:
            self._fuse.is_blown = True
        for peer in filter(None, (self.peer, self._head_peer)):
            self._swarm.memory.crash(peer, detect_after_s=detect_after_s)
        await self._stack.aclose()

    async def stop(self) -> None:
        """End for good."""
        self.server = None
        await self._stack.aclose()

    def hang(self) -> None:
        """The engine stands still; the rest of the process lives."""
        self._hung.clear()

    def unhang(self) -> None:
        """The engine goes on."""
        self._hung.set()

    async def _pace(self, calls: Sequence[Call]) -> None:
        num_tokens = sum(call.count for call in calls)
        await asyncio.sleep(
            self.slowness * (self.spec.iteration_s + num_tokens * self.spec.token_s)
        )
        await self._hung.wait()

    async def _step(self, num_rows: int) -> None:
        """The time of a training step: one block of a span."""
        whole_s = self.spec.iteration_s + num_rows * self.spec.token_s
        await asyncio.sleep(self.slowness * whole_s / len(self.spec.span))
        await self._hung.wait()

    def _choose_training_fault(self, work: PassWork, block: int) -> TrainingFault | None:
        return None if self.training_fault is None else self.training_fault(work, block)

    def _choose_fault(self, call: Call) -> ToyFault | None:
        return self.fault(call) if self.fault is not None else None


class SimulatedSwarm:
    """Servers and clients on one simulated network. An async context manager."""

    def __init__(
        self,
        specs: Sequence[ServerSpec],
        network: SimulatedNetwork,
        rng: random.Random,
        *,
        num_blocks: int,
        server_config: ServerConfig | None = None,
        mixes_call_shape: bool = False,
        record: Callable[[Began], Recorder] | None = None,
    ) -> None:
        self.record = record
        """Makes the recorder of each server that starts."""
        self.num_blocks = num_blocks
        self.network = network
        self.memory = MemoryNetwork(network)
        self.swarm_pass = SwarmPass.open(SWARM)
        self.server_config = server_config or ServerConfig(quotas=Quotas(cache_share=1.0))
        self.mixes_call_shape = mixes_call_shape
        self.directory = StaticDirectory(SWARM, is_lasting=True)
        self.clients: list[Client] = []
        self._rng = rng
        self._stack = AsyncExitStack()
        self.servers = [
            SimulatedServer(self, spec, Identity.from_seed(rng.randbytes(32))) for spec in specs
        ]

    async def __aenter__(self) -> SimulatedSwarm:
        for server in self.servers:
            if not server.spec.is_late:
                await server.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()
        for server in self.servers:
            await server.stop()

    async def open_client(
        self, *, patience_s: float = 120.0, tending: TendConfig | None = None
    ) -> Client:
        """A client with an identity of its own; closed with the swarm."""
        opening = self.new_client(patience_s=patience_s, tending=tending)
        client = await self._stack.enter_async_context(opening)
        self.clients.append(client)
        return client

    @asynccontextmanager
    async def new_client(
        self, *, patience_s: float = 120.0, tending: TendConfig | None = None
    ) -> AsyncIterator[Client]:
        """A client with an identity of its own, inside the context."""
        identity = Identity.from_seed(self._rng.randbytes(32))
        transport = self.memory.transport(identity.peer)
        config = ClientConfig(
            model=MODEL,
            num_blocks=self.num_blocks,
            hidden_size=HIDDEN_SIZE,
            patience_s=patience_s,
            tending=tending or TendConfig(),
        )
        try:
            async with open_client(
                identity,
                transport,
                self.swarm_pass,
                self.directory,
                config,
                rng=random.Random(self._rng.random()),
                wall_clock=asyncio.get_running_loop().time,
            ) as client:
                yield client
        finally:
            await transport.close()

    async def open_thin_client(self, *, patience_s: float = 60.0) -> ThinClient:
        """A thin client with an identity of its own; closed with the swarm."""
        transport = self.memory.transport(Identity.from_seed(self._rng.randbytes(32)).peer)
        self._stack.push_async_callback(transport.close)
        config = ThinConfig(
            model=MODEL, num_blocks=self.num_blocks, hidden_size=HIDDEN_SIZE,
            vocab_size=VOCABULARY, patience_s=patience_s,
        )  # fmt: skip
        rng = random.Random(self._rng.random())
        opening = open_thin_client(transport, self.swarm_pass, self.directory, config, rng)
        return await self._stack.enter_async_context(opening)

    def publish(self, server: SimulatedServer, address: str, boot: int) -> None:
        """Make a server's record known to everybody, as a perfect directory would."""
        spec = server.spec
        facts = server.backend.facts if server.backend is not None else None
        if facts is None:
            raise RuntimeError("a server publishes while it is up")
        record = Record(
            peer=server.peer,
            swarm=SWARM,
            boot_ms=boot,
            counter=1,
            ttl_s=RECORD_TTL_S,
            state="online",
            addresses=[address],
            model=MODEL,
            num_blocks=self.num_blocks,
            hidden_size=HIDDEN_SIZE,
            start=spec.span.start,
            end=spec.span.end,
            numerics=facts.numerics,
            is_exact=facts.is_exact,
            encodings=list(facts.encodings),
            cache_tokens=facts.cache_tokens,
            decode_s_per_block=(spec.iteration_s + spec.token_s) / len(spec.span),
            head=spec.head,
            adapters=[Adapter(label, part.manifest.name) for label, part in spec.adapters],
        )
        now_s = asyncio.get_running_loop().time()
        self.directory.store.accept(sign_record(server.identity, record), now_s)
