"""What a machine of a ring does when it is told to: measure, fetch, load, serve, announce.

The same on the starter, for blocks of its own, and on nodes. It is a server like any other;
only who chooses its blocks differs, and that it begins without any.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from typing import Final

import shoal
from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import ConfigError, InternalError
from shoal.base.spans import Span
from shoal.cli.joining import wall_clock
from shoal.cli.loading import load_blocks
from shoal.cli.models import OpenModel
from shoal.cli.peer_weights import Swarm, fetch_items, span_items, weight_store
from shoal.cli.ring_memory import (
    FIRST_USE_BYTES,
    RESERVE_BYTES,
    memory_left,
    process_memory,
    trim,
)
from shoal.cli.ring_sizes import ring_sizes
from shoal.cli.sizes import size_text
from shoal.discovery.gossip import GossipDirectory
from shoal.model.measure import BlockTimes, measure_block_times
from shoal.model.probe_source import ProbeSource
from shoal.model.quantize import quantization
from shoal.model.rows import encodings_for
from shoal.model.source import ModelSource
from shoal.model.torch_backend import BackendConfig, exact_choice
from shoal.net.address import Address
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.tasks import TaskSet
from shoal.net.transport import Transport
from shoal.plan import ring as plan
from shoal.server.announcing import Announcement, Announcer, StoreBook
from shoal.server.config import ServerConfig, StreamService
from shoal.server.door import Door
from shoal.server.engine import EngineLimits
from shoal.server.idle_backend import IdleBackend
from shoal.server.quotas import Quotas
from shoal.server.ring_blocks import RingBlocks
from shoal.server.ring_node import NodeFigures
from shoal.server.server import Server, open_server
from shoal.server.switching import SwitchingBackend
from shoal.wire.ring import Measured, RingModel

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S: Final = 0.0005
"""As in `serving`."""

FAREWELL_S: Final = 1.0

SESSIONS_MAX: Final = 4096
"""Of one run: as many samples as the cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footing:
    """What a machine stands on in the ring's swarm: made by whoever joined."""

    identity: Identity
    swarm_pass: SwarmPass
    transport: Transport
    directory: GossipDirectory
    door: Door
    book: StoreBook
    addresses: tuple[Address, ...]
    services: Mapping[str, StreamService]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSettings:
    """What this machine gives."""

    threads: int
    memory_bytes: int | None
    """The process may take so much in all; None: what is free."""


GetModel = Callable[[RingModel], Awaitable[tuple[OpenModel, Footing]]]
"""Finds the model and gets ready to be dialled."""


class RingHost:
    """`NodeWork` for real. An async context manager."""

    def __init__(
        self, settings: HostSettings, get_model: GetModel, peers: Callable[[Footing], Swarm]
    ) -> None:
        self._settings = settings
        self._get_model = get_model
        self._peers = peers
        self._stack = AsyncExitStack()
        self._tasks = TaskSet("ring host")
        self._pins = ExitStack()
        self._running: _Running | None = None

    async def __aenter__(self) -> RingHost:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._tasks.close()
        await self._stack.aclose()
        self._pins.close()
        gc.collect()

    @property
    def span(self) -> Span:
        """The blocks that are served; empty: none."""
        return Span(0, 0) if self._running is None else self._running.blocks.span

    async def measure(self, model: RingModel) -> Measured:
        """Open the model, run one made-up block of it, and open a server without blocks.

        Raises:
            ConfigError: not even one block fits here; names the numbers.
            ModelError, PeerError: the model can't be had.
        """
        opened, footing = await self._get_model(model)
        config = BackendConfig(
            model=opened.name,
            dtype=model.dtype,
            quantize=quantization(model.quantize),
            exact=exact_choice(model.exact),
            threads=self._settings.threads,
            cache_tokens=model.cache_tokens,
        )
        sizes = ring_sizes(opened.source.config, model.dtype, config.quantize, model.cache_tokens)
        check_room(sizes, Span(0, 1), max(0, self._free() - FIRST_USE_BYTES), "one block")
        facts, times = await probe(opened.source, config)
        offered = self._free()
        await self._open(opened, config, sizes, footing, facts, times)
        return Measured(
            memory_bytes=offered,
            decode_s_by_batch=list(times.decode_s_by_batch),
            prefill_s_per_block_token=times.prefill_s_per_block_token,
        )

    async def take(self, span: Span, *, is_beside: bool) -> None:
        """As `RingBlocks.take`."""
        if self._running is None:
            raise InternalError("told to take blocks before anything was measured")
        await self._running.blocks.take(span, is_beside=is_beside)

    @property
    def num_sessions(self) -> int:
        """Sessions that run here."""
        return 0 if self._running is None else len(self._running.server.sessions)

    async def see_off(self, within_s: float) -> None:
        """As a server that drains: nothing new comes in, owners move their sessions elsewhere."""
        if self._running is None:
            return
        await self._running.announcing.draining()
        if not await self._running.server.drain(within_s):
            logger.warning("left behind sessions=%d; their owners repair them", self.num_sessions)

    def figures(self) -> NodeFigures:
        """How this process does."""
        memory = process_memory()
        if self._running is None:
            return NodeFigures(
                memory_bytes=memory.resident, memory_peak_bytes=memory.peak, free_bytes=0
            )
        engine, now_s = self._running.server.engine, asyncio.get_running_loop().time()
        return NodeFigures(
            memory_bytes=memory.resident,
            memory_peak_bytes=memory.peak,
            free_bytes=self._free(),
            busy_s=engine.busy_s(now_s),
            up_s=now_s - self._running.since_s,
            iterations=engine.iteration,
            rows=engine.rows,
            pace_s=engine.pace.decode_s_per_block(now_s),
        )

    def _free(self) -> int:
        return max(0, memory_left(self._settings.memory_bytes) - RESERVE_BYTES)

    async def _open(
        self,
        opened: OpenModel,
        config: BackendConfig,
        sizes: plan.RingModel,
        footing: Footing,
        facts: BackendFacts,
        times: BlockTimes,
    ) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        backend = SwitchingBackend(IdleBackend(facts))
        self._stack.push_async_callback(backend.aclose)
        server = await self._stack.enter_async_context(
            open_server(
                backend, footing.transport, footing.swarm_pass, footing.book, _bounds(footing)
            )
        )
        footing.door.open(server)
        announcing = _Announcing(footing, facts, times, self._tasks)
        self._stack.push_async_callback(announcing.idle)

        async def load(span: Span) -> BlockBackend:
            check_room(sizes, span, self._free(), f"blocks {span}", backend.facts.span)
            await self._fetch(opened, span, footing)
            new = await load_blocks(opened.source, span, config, beside=backend.newest)
            trim()
            return new

        self._running = _Running(
            server=server,
            blocks=RingBlocks(server, backend, load, announcing, tidy),
            announcing=announcing,
            since_s=asyncio.get_running_loop().time(),
        )

    async def _fetch(self, opened: OpenModel, span: Span, footing: Footing) -> None:
        """The span's tensors, from the starter or from others; kept as long as it is ours."""
        if not opened.is_from_peers:
            return
        items = await asyncio.to_thread(span_items, opened, span)
        before, self._pins = self._pins, ExitStack()
        with before:
            self._pins.enter_context(weight_store().pinned(one.content.hex() for one in items))
            await fetch_items(opened, items, self._peers(footing), span)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """A server that is open, with blocks or without."""

    server: Server
    blocks: RingBlocks
    announcing: _Announcing
    since_s: float


class _Announcing:
    """This machine's record: what it serves, nothing while it serves nothing."""

    def __init__(
        self, footing: Footing, facts: BackendFacts, times: BlockTimes, tasks: TaskSet
    ) -> None:
        said = Announcement(
            swarm=footing.swarm_pass.name,
            boot_ms=int(wall_clock() * 1000),
            addresses=tuple(map(str, footing.addresses)),
            facts=facts,
            decode_s_per_block=times.decode_s_per_block,
            prefill_s_per_block_token=times.prefill_s_per_block_token,
            decode_s_by_batch=times.decode_s_by_batch,
            version=shoal.__version__,
        )
        self._announcer = Announcer(footing.identity, footing.directory, said)
        self._tasks = tasks
        self._keeping: asyncio.Task[None] | None = None

    async def loading(self, facts: BackendFacts) -> None:
        """These blocks will be served soon."""
        self._announcer.restate(replace(self._announcer.announcement, facts=facts))
        await self._announcer.announce("joining")
        self._keep()

    async def serving(self, facts: BackendFacts) -> None:
        """These blocks are served from now on."""
        await self._announcer.moved(facts)
        self._keep()

    async def draining(self) -> None:
        """These blocks are served to those who are here, and to nobody else."""
        await self._announcer.announce("draining")

    async def idle(self) -> None:
        """Nothing is served here."""
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
            await self._announcer.withdraw(FAREWELL_S)

    def _keep(self) -> None:
        if self._keeping is None:
            self._keeping = self._tasks.spawn(self._announcer.keep(), "announcer")


def check_room(
    sizes: plan.RingModel, span: Span, free_bytes: int, what: str, beside: Span | None = None
) -> None:
    """See that blocks, a full cache and a full log for them fit, beside those that are served.

    Raises:
        ConfigError: they don't; names the numbers.
    """
    need = sizes.need_bytes(span, beside)
    if need > free_bytes:
        raise ConfigError(
            f"{what} with a cache of {sizes.cache_tokens} positions need {size_text(need)}, and "
            f"this machine can give {size_text(free_bytes)} ({size_text(RESERVE_BYTES)} are kept "
            "for the process itself)"
        )


async def probe(source: ModelSource, config: BackendConfig) -> tuple[BackendFacts, BlockTimes]:
    """Facts of the real engine, and its times, with one block whose values are made up.

    What the libraries hold from then on is part of the process, and not of the blocks.
    """
    few = replace(config, cache_tokens=min(config.cache_tokens, 1024))
    backend = await load_blocks(ProbeSource(source), Span(0, 1), few)
    try:
        times = await measure_block_times(backend)
        return replace(backend.facts, cache_tokens=config.cache_tokens), times
    finally:
        await backend.aclose()
        del backend
        await tidy()


async def tidy() -> None:
    """Give the system back what is not used any more."""
    await asyncio.to_thread(gc.collect)  # modules hold each other in circles
    trim()


def _bounds(footing: Footing) -> ServerConfig:
    """One run has the whole cache for itself: a ring's users trust each other."""
    return ServerConfig(
        engine=EngineLimits(),
        quotas=Quotas(sessions_per_client=SESSIONS_MAX, cache_share=1.0),
        services=dict(footing.services),
    )


def empty_facts(model: OpenModel, dtype: str, cache_tokens: int) -> BackendFacts:
    """What a door says of a machine that serves nothing yet."""
    return BackendFacts(
        model=model.name,
        span=Span(0, 0),
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        encodings=encodings_for(dtype),
        numerics="",
        is_exact=False,
        cache_tokens=cache_tokens,
        page_tokens=1,
        session_tokens_max=1,
    )
