"""What `shoal serve` does: join, load, announce, serve, leave."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import shoal
from shoal.base.adapters import AdapterPart
from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId, peer_text
from shoal.base.spans import Span
from shoal.cli.adapters import adapter_limits, read_served
from shoal.cli.bounds import Bounds
from shoal.cli.head_host import serving_head
from shoal.cli.joining import SwarmChoice, keep_on_lan, wall_clock
from shoal.cli.loading import load_blocks
from shoal.cli.metrics_host import ServerParts, serving_metrics
from shoal.cli.models import OpenModel
from shoal.cli.moving import keep_placed, loader, mover_of
from shoal.cli.own_addresses import own_addresses
from shoal.cli.peer_weights import Swarm, fetch_items, head_items, span_items, weight_store
from shoal.cli.placing import PlaceChoice, find_place
from shoal.cli.recorder import server_maker
from shoal.cli.shelves import ThreadedShelf
from shoal.cli.tracing import TraceChoice
from shoal.client.head_service import HeadService
from shoal.client.weight_ledger import Item
from shoal.discovery.gossip import GossipConfig, GossipDirectory
from shoal.model.measure import measure_block_times
from shoal.model.quantize import quantization
from shoal.model.rows import encodings_for, torch_dtype
from shoal.model.shelf import ModelShelf
from shoal.model.store_source import StoreSource
from shoal.model.torch_backend import BackendConfig, exact_choice
from shoal.net.address import Address, parse_listen
from shoal.net.channel import PURPOSE_GOSSIP, PURPOSE_HEAD, PURPOSE_WEIGHTS
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.metering import MeteredTransport
from shoal.net.tasks import first_failure, wait_ended
from shoal.net.tcp import TcpTransport
from shoal.server.adapters import BYTES_MAX
from shoal.server.announcing import Announcement, Announcer, StoreBook
from shoal.server.config import StreamService
from shoal.server.door import Door
from shoal.server.moving import SpanMover
from shoal.server.refreshing import Refresher
from shoal.server.server import Server, open_server
from shoal.server.surroundings import Pinger, ServerSurroundings
from shoal.server.switching import SwitchingBackend
from shoal.server.weights import WeightsConfig, WeightServer, hand_out_nothing

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S: Final = 0.0005
"""The event loop gets the interpreter back from the engine's thread within this."""

FAREWELL_S: Final = 2.0
"""How long a leaving server tries to hand out its tombstone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """What `shoal serve` was asked to do."""

    swarm: SwarmChoice
    listen: str
    announce: str | None
    identity: Path | None
    span: Span | None
    num_blocks: int | None
    """Instead of a span: how many blocks, wherever the swarm needs them most."""
    place: PlaceChoice | None
    """How it finds them; None: the span is given, or all blocks."""
    dtype: str
    quantize: str
    exact: str
    device: str
    threads: int
    cache_tokens: int
    bounds: Bounds
    has_head: bool
    """Whether it answers thin clients."""
    metrics: tuple[str, int] | None
    """Host and port for Prometheus."""
    drain_s: float
    """How long a server that is told to stop waits for its sessions to be moved."""
    weights_bytes_per_s: int
    """At which others may fetch weights from here; 0: not at all."""
    trace: TraceChoice | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Directories of the LoRA adapters that it serves to everybody, by name."""
    adapter_bytes: int = BYTES_MAX
    """Memory for adapters that clients bring; 0: none are taken."""


async def serve_until_stopped(settings: ServeSettings, model: OpenModel) -> None:
    """Serve until SIGINT or SIGTERM; a second signal cuts draining and farewell short.

    Raises:
        ShoalError: it could not start, or its identity is in use elsewhere.
    """
    loop = asyncio.get_running_loop()
    work = loop.create_task(_serve(settings, model), name="serve")
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        logger.info("stopped by a signal")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joined:
    """A server's part in the swarm, before it has any weights."""

    swarm_pass: SwarmPass
    transport: MeteredTransport
    tcp: TcpTransport
    directory: GossipDirectory
    book: StoreBook
    door: Door
    announcer: Announcer
    services: dict[str, StreamService]
    weights: WeightServer | None
    addresses: tuple[Address, ...]
    keeping: list[asyncio.Task[None]]
    """They run until the end; the first that fails ends the server."""


async def _join(
    settings: ServeSettings,
    model: OpenModel,
    identity: Identity,
    facts: BackendFacts,
    known: Collection[PeerId],
    stack: AsyncExitStack,
) -> _Joined:
    """Listen, find the others and say that we are coming; `known` peers are ours."""
    allow = settings.bounds.allow
    swarm_pass = replace(
        settings.swarm.pass_for(identity),
        allow=allow and allow.union(known),
        deny=settings.bounds.deny,
    )
    tcp = TcpTransport(identity)
    transport = MeteredTransport(tcp)
    stack.push_async_callback(transport.close)
    gossip = GossipConfig(swarm_pass=swarm_pass, joins=settings.swarm.joins)
    directory = GossipDirectory(transport, gossip, random.SystemRandom())
    book = StoreBook(directory.store)
    services: dict[str, StreamService] = {PURPOSE_GOSSIP: directory.serve}
    weights = _weight_server(settings, model)
    services[PURPOSE_WEIGHTS] = hand_out_nothing if weights is None else weights.serve
    door = Door(swarm_pass, book, facts, services)
    listener = await transport.listen(parse_listen(settings.listen), door.serve_stream)
    addresses, hosts = _addresses(settings, listener.address)
    await stack.enter_async_context(directory)
    announcer = Announcer(identity, directory, _announcement(swarm_pass, addresses, facts))
    stack.push_async_callback(announcer.withdraw, FAREWELL_S)
    await announcer.announce("joining")
    keeping = [asyncio.create_task(announcer.keep(), name="announcer")]
    if settings.swarm.is_lan:
        said = (swarm_pass.name, facts.model)
        on_lan = keep_on_lan(directory, listener.address, hosts, said)
        keeping.append(asyncio.create_task(on_lan, name="lan"))
    stack.push_async_callback(_end, keeping)
    return _Joined(
        swarm_pass=swarm_pass,
        transport=transport,
        tcp=tcp,
        directory=directory,
        book=book,
        door=door,
        announcer=announcer,
        services=services,
        weights=weights,
        addresses=addresses,
        keeping=keeping,
    )


async def _serve(settings: ServeSettings, model: OpenModel) -> None:
    own_adapters = await asyncio.to_thread(read_served, settings.adapters, model)
    settings = await _placed(settings, model)
    facts, config = _plan(settings, model)
    identity, head_identity = _identity(settings.identity), Identity.generate()
    async with AsyncExitStack() as stack:
        here = await _join(settings, model, identity, facts, [head_identity.peer], stack)
        announcer, directory, services = here.announcer, here.directory, here.services
        peers = Swarm(here.transport, here.swarm_pass, directory.snapshot)
        fetch = partial(_fetch, model, swarm=peers, stack=stack)
        await fetch(facts.span)
        if settings.has_head and model.is_from_peers:
            await _fetch_items(model, await asyncio.to_thread(head_items, model), peers, stack)
        loop, since_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        backend = SwitchingBackend(await _load(model, config, facts.span))
        load_s = loop.time() - since_s
        stack.push_async_callback(backend.aclose)
        heads: HeadService | None = None
        if settings.has_head:
            heads = await stack.enter_async_context(
                serving_head(model, settings.dtype, settings.swarm, directory, head_identity)
            )
            announcer.restate(replace(announcer.announcement, head=heads.head.facts.numerics))
            services = {**services, PURPOSE_HEAD: heads.serve}
        announcer.restate(await _measured(announcer.announcement, backend))
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        bounds = replace(
            settings.bounds.server_config(services),
            adapters=replace(
                adapter_limits(settings.adapter_bytes),
                address_share=settings.bounds.quotas.address_share,
            ),
        )
        make = server_maker(settings.trace, identity.peer, backend.facts, bounds)
        server = await stack.enter_async_context(
            open_server(backend, here.transport, here.swarm_pass, here.book, bounds, make=make)
        )
        await _serve_adapters(own_adapters, server, announcer)
        if here.weights is not None:
            here.weights.yield_to(lambda: server.engine.running_tokens > 0)
        here.door.open(server)
        if settings.metrics is not None:
            parts = ServerParts(server=server, transport=here.transport, heads=heads)
            await stack.enter_async_context(serving_metrics(settings.metrics, parts))
        stack.push_async_callback(announcer.withdraw, FAREWELL_S)
        # Not before it has drained: until then somebody must refute that it has gone.
        stack.push_async_callback(_end, here.keeping)
        stack.push_async_callback(_drain, server, heads, announcer, settings.drain_s)
        if heads is not None:
            stack.callback(heads.leave)
        # Round trips were measured while blocks loaded: the first record has a place.
        place = here.directory.gossiper.coordinate
        announcer.restate(replace(announcer.announcement, coordinate=place))
        await announcer.announce("online")
        peer = peer_text(identity.peer)
        print(f"ready peer={peer} address={here.addresses[0]} blocks={facts.span}", flush=True)
        load = loader(model, config, fetch, partial(_load, model, config), backend)
        mover = mover_of(server, backend, announcer, load)
        keeping = [*here.keeping, *_upkeep(settings, here, server, mover, load_s)]
        stack.push_async_callback(_end, keeping[len(here.keeping) :])
        await first_failure(*map(wait_ended, keeping), server.wait_broken())


def _upkeep(
    settings: ServeSettings, here: _Joined, server: Server, mover: SpanMover, load_s: float
) -> list[asyncio.Task[None]]:
    """What runs beside serving: the record is kept true, and the server where it is needed."""
    refresher = Refresher(
        here.announcer,
        lambda: server.engine.pace,
        lambda: here.directory.gossiper.coordinate,
        sent_bytes_per_s=here.tcp.sent_bytes_per_s,
    )
    keeping = [asyncio.create_task(refresher.run(), name="refresher")]
    if settings.place is not None and settings.place.period_s:
        around = ServerSurroundings(
            server=server,
            announcer=here.announcer,
            directory=here.directory,
            pinger=Pinger(here.transport, here.swarm_pass, random.SystemRandom()),
            mover=mover,
            load_s=load_s,
        )
        placing = keep_placed(settings.place, around)
        keeping.append(asyncio.create_task(placing, name="placing"))
    return keeping


async def _serve_adapters(
    adapters: Mapping[str, AdapterPart], server: Server, announcer: Announcer
) -> None:
    """Load adapters of our own, and say so from the next record on."""
    for label, part in adapters.items():
        await server.adapters.add_own(label, part)
        logger.info("adapter served label=%s name=%s", label, part.manifest.name.hex())
    said = tuple(server.adapters.labels.items())
    announcer.restate(replace(announcer.announcement, adapters=said))


def _addresses(
    settings: ServeSettings, listening: Address
) -> tuple[tuple[Address, ...], tuple[str, ...]]:
    """Where others can dial us, and our hosts in the local network if we are to be found there.

    Raises:
        ConfigError: malformed, or no network.
    """
    addresses = own_addresses(listening, settings.listen, settings.announce)
    if not settings.swarm.is_lan:
        return addresses, ()
    from shoal.discovery.lan import lan_hosts

    return addresses, lan_hosts(parse_listen(settings.listen).host)


def _announcement(
    swarm_pass: SwarmPass, addresses: tuple[Address, ...], facts: BackendFacts
) -> Announcement:
    """What is said before anything is measured."""
    return Announcement(
        swarm=swarm_pass.name,
        boot_ms=int(wall_clock() * 1000),
        addresses=tuple(map(str, addresses)),
        facts=facts,
        version=shoal.__version__,
    )


def _weight_server(settings: ServeSettings, model: OpenModel) -> WeightServer | None:
    if not settings.weights_bytes_per_s or model.manifest is None:
        return None
    holds = model.source.holds if isinstance(model.source, StoreSource) else None
    shelf = ThreadedShelf(ModelShelf(model.source, model.manifest, holds))
    return WeightServer(shelf, WeightsConfig(rate_bytes_per_s=settings.weights_bytes_per_s))


async def _fetch(model: OpenModel, span: Span, swarm: Swarm, stack: AsyncExitStack) -> None:
    """Get the span's tensors if others have them; nobody removes them while we live."""
    if not model.is_from_peers:
        return
    await _fetch_items(model, await asyncio.to_thread(span_items, model, span), swarm, stack, span)


async def _fetch_items(
    model: OpenModel,
    items: Sequence[Item],
    swarm: Swarm,
    stack: AsyncExitStack,
    span: Span | None = None,
) -> None:
    stack.enter_context(weight_store().pinned(item.content.hex() for item in items))
    await fetch_items(model, items, swarm, span)


async def _drain(
    server: Server, heads: HeadService | None, announcer: Announcer, within_s: float
) -> None:
    """Leave in good order: nothing new comes in, owners move their sessions elsewhere, and thin
    clients get the answers at work to their end."""
    answers = 0 if heads is None else heads.num_answers
    if not within_s or not (len(server.sessions) or answers):
        return
    print(f"draining sessions={len(server.sessions)} answers={answers} within={within_s:.0f}s",
          flush=True)  # fmt: skip
    await announcer.announce("draining")
    works = [server.drain(within_s)]
    if heads is not None:
        works.append(heads.drain(within_s))
    if not all(await asyncio.gather(*works)):
        logger.warning("left behind sessions=%d answers=%d; their owners repair them elsewhere",
                       len(server.sessions), 0 if heads is None else heads.num_answers)  # fmt: skip


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    """A server that leaves renews and announces nothing any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _placed(settings: ServeSettings, model: OpenModel) -> ServeSettings:
    """With the span that `--num-blocks` leads to."""
    if settings.num_blocks is None or settings.place is None:
        return settings
    span = await find_place(
        settings.swarm, model, settings.place.policy, settings.num_blocks,
        settings.cache_tokens, random.SystemRandom(),
    )  # fmt: skip
    logger.info("place chosen blocks=%s policy=%s", span, settings.place.policy)
    return replace(settings, span=span)


def _plan(settings: ServeSettings, model: OpenModel) -> tuple[BackendFacts, BackendConfig]:
    """What will be served, before it is loaded; refuses what can't be at once."""
    span = settings.span or Span(0, model.num_blocks)
    if span.end > model.num_blocks:
        raise ConfigError(f"--blocks {span}: {model.given} has blocks [0,{model.num_blocks})")
    torch_dtype(settings.dtype)
    config = BackendConfig(
        model=model.name,
        dtype=settings.dtype,
        quantize=quantization(settings.quantize),
        exact=exact_choice(settings.exact),
        device=settings.device,
        threads=settings.threads,
        cache_tokens=settings.cache_tokens,
    )
    facts = BackendFacts(
        model=model.name,
        span=span,
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        encodings=encodings_for(settings.dtype),
        numerics="",
        is_exact=False,
        cache_tokens=settings.cache_tokens,
        page_tokens=1,
        session_tokens_max=1,
    )
    return facts, config


def _identity(path: Path | None) -> Identity:
    return Identity.generate() if path is None else Identity.load_or_create(path)


async def _load(
    model: OpenModel, config: BackendConfig, span: Span, beside: BlockBackend | None = None
) -> BlockBackend:
    return await load_blocks(model.source, span, config, beside=beside)


async def _measured(announcement: Announcement, backend: BlockBackend) -> Announcement:
    times = await measure_block_times(backend)
    return replace(
        announcement,
        facts=backend.facts,
        decode_s_per_block=times.decode_s_per_block,
        prefill_s_per_block_token=times.prefill_s_per_block_token,
        decode_s_by_batch=times.decode_s_by_batch,
    )
