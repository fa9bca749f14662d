"""A gateway from its parts: a client, a head, a tokenizer, and what it is allowed to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from shoal.base.errors import ConfigError
from shoal.base.limits import SESSION_TOKENS_MAX
from shoal.base.spans import Span, missing_blocks
from shoal.client.client import Client
from shoal.client.dispatch import open_dispatcher
from shoal.client.session import Recovery
from shoal.client.thin import ThinClient
from shoal.client.waves import Waves
from shoal.discovery.directory import Snapshot
from shoal.discovery.records import Record
from shoal.gateway.answering import Words
from shoal.gateway.app import Api, ModelFacts, Parts
from shoal.gateway.closing import Closing
from shoal.gateway.dispatch import Dispatch, EachForItself, Seats
from shoal.gateway.encoding import Encoder
from shoal.gateway.engine import Engine, Served
from shoal.gateway.front import Front, FrontConfig
from shoal.gateway.grammars import Grammars
from shoal.gateway.kept import KeptConfig, KeptSessions
from shoal.gateway.keys import Keys
from shoal.gateway.line import Line, LineConfig
from shoal.gateway.meter import Meter
from shoal.gateway.sequences import ChainSequence, ThinSequence, TokenSequence
from shoal.hf.head import Head
from shoal.hf.head_batch import HeadBatch, Progress, find_head_tiles
from shoal.model.row_tiles import TILE_ROWS_MAX, RowTiles
from shoal.plan.dispatching import Stages
from shoal.plan.live_problem import SESSION_TOKENS
from shoal.plan.routing import Wanted

Exactness = Literal["auto", "always"]
"""Whether company may change the last bits of the head's scores where keeping them costs
several times the work (float32 on CPUs): `auto` lets it."""

GUARDED: Final = frozenset({"v1", "metrics", "swarm.json"})
"""Paths that need a key, where there are keys: pages hold nothing of anybody's."""

KEPT_SHARE: Final = 4
"""Sessions at rest may have one part in this of the smallest server's cache."""

BODY_BYTES_MIN: Final = 1 << 20
BODY_BYTES_PER_TOKEN: Final = 64
"""A body has room for so many bytes per token of the context: JSON, and long words."""

SWEEP_S: Final = 10.0
"""Between two looks for sessions that nobody came back to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backing:
    """What answers come from."""

    client: Client | ThinClient
    head: Head | None
    """None: servers have it, with a thin client."""
    encoding: str
    inner_encoding: str | None
    tokenizer: Any
    end_ids: Collection[int]
    config: Any
    """transformers' own, of the model."""
    snapshot: Callable[[], Snapshot]
    """Who serves now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """How a gateway behaves."""

    names: tuple[str, ...]
    """Of the model; the first one is what answers say."""
    keys: Keys = field(default_factory=lambda: Keys({}))
    line: LineConfig = field(default_factory=LineConfig)
    kept_tokens: int | None = None
    """Positions of sessions at rest; None: a part of the smallest server's cache."""
    exactness: Exactness = "auto"
    template: str | None = None
    """In place of the model's own."""
    hosts: frozenset[str] | None = None
    """See `FrontConfig`."""
    dispatch: Dispatch = "each"
    """Who chooses chains; thin clients leave that to the servers with heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What a gateway shows and tells besides."""

    routes: Sequence[BaseRoute] = ()
    """Other pages."""
    on_repair: Callable[[Recovery], None] = lambda recovery: None
    """Told of each repair under an answer."""
    on_progress: Progress | None = None
    """Told of the head's probe, which takes seconds with large vocabularies."""
    closing: Closing = field(default_factory=Closing)
    """Ends what is at work when the gateway stops."""


@asynccontextmanager
async def open_gateway(
    backing: Backing,
    config: GatewayConfig,
    wall_clock: Callable[[], float],
    extras: Extras | None = None,
) -> AsyncIterator[ASGIApp]:
    """A gateway as an ASGI application, on the client's event loop.

    Answers that are being written when it closes are not waited for: stop serving first.

    Raises:
        ConfigError: a dispatcher before a thin client.
    """
    model = backing.client.config.model
    records = _records(backing.snapshot(), model)
    num_blocks = backing.client.config.num_blocks
    context = context_tokens(backing.config, records, num_blocks)
    extras = extras or Extras()
    meter = Meter(extras.on_repair)
    mind = await _mind(backing, config.exactness, extras.on_progress)
    words = Words(
        tokenizer=backing.tokenizer,
        end_ids=frozenset(backing.end_ids),
        vocab_size=mind.vocab_size,
    )
    stack = AsyncExitStack()
    served = Served(
        open_sequence=mind.open_sequence,
        words=words,
        context_tokens=context,
        seats=await _seats(backing, config.dispatch, context, stack),
        open_adapted=mind.open_adapted,
    )
    kept_tokens = config.kept_tokens
    if kept_tokens is None:
        smallest = min((record.cache_tokens for record in records), default=0)
        kept_tokens = smallest // KEPT_SHARE
    kept = KeptSessions(KeptConfig(tokens_max=kept_tokens))
    line = Line(config.line)
    grammars = Grammars(backing.tokenizer, words.vocab_size, words.end_ids)
    encoder = Encoder(backing.tokenizer, config.template, context)
    parts = Parts(
        facts=ModelFacts(
            names=config.names,
            created=int(wall_clock()),
            num_blocks=num_blocks,
            context_tokens=context,
        ),
        engine=Engine(served, kept, grammars, meter),
        encoder=encoder,
        line=line,
        meter=meter,
        wall_clock=wall_clock,
        body_bytes_max=max(BODY_BYTES_MIN, BODY_BYTES_PER_TOKEN * context),
        missing_blocks=lambda: _missing(_records(backing.snapshot(), model), num_blocks),
        adapters=lambda: _adapters(mind, _records(backing.snapshot(), model), num_blocks),
        closing=extras.closing,
    )
    _watch(meter, backing.client, mind.batch, line, kept)
    sweeping = asyncio.create_task(_sweep(kept), name="gateway sweep")
    front = FrontConfig(keys=config.keys, guarded=GUARDED, hosts=config.hosts)
    try:
        yield Front(Api(parts).routes(extras.routes), front, meter)
    finally:
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        kept.clear()
        encoder.close()
        await stack.aclose()


async def _seats(
    backing: Backing, dispatch: Dispatch, context: int, stack: AsyncExitStack
) -> Seats:
    if dispatch == "each":
        return EachForItself()
    if isinstance(backing.client, ThinClient):
        raise ConfigError("--dispatch chains: with --thin the servers with heads choose chains")
    tokens = min(SESSION_TOKENS, context)
    wanted = Wanted(
        encoding=backing.encoding, inner_encoding=backing.inner_encoding or backing.encoding
    )
    dispatcher = open_dispatcher(backing.client, wanted, tokens, asyncio.to_thread)
    return await stack.enter_async_context(dispatcher)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mind:
    """Where tokens come from."""

    open_sequence: Callable[[Stages], Awaitable[TokenSequence]]
    vocab_size: int
    batch: HeadBatch | None = None
    open_adapted: Callable[[bytes], Awaitable[TokenSequence]] | None = None


async def _mind(backing: Backing, exactness: Exactness, progress: Progress | None) -> _Mind:
    client, head = backing.client, backing.head
    if isinstance(client, ThinClient):
        thin = client

        async def open_thin(chain: Stages) -> TokenSequence:
            return ThinSequence(await thin.open_session())

        async def open_thin_adapted(adapter: bytes) -> TokenSequence:
            return ThinSequence(await thin.open_session(adapter))

        return _Mind(
            open_sequence=open_thin,
            vocab_size=thin.config.vocab_size,
            open_adapted=open_thin_adapted,
        )
    if head is None:
        raise ConfigError("a gateway needs a head, or a thin client")
    batch = await asyncio.to_thread(_head_batch, head, exactness, progress)
    whole, mine, waves = client, head, Waves()

    async def open_chain(chain: Stages) -> TokenSequence:
        session = await whole.open_session(
            backing.encoding, inner_encoding=backing.inner_encoding, chain=chain
        )
        return ChainSequence(session, mine, batch, waves)

    async def open_adapted(adapter: bytes) -> TokenSequence:
        session = await whole.open_session(
            backing.encoding, inner_encoding=backing.inner_encoding, adapter=adapter
        )
        return ChainSequence(session, mine, batch, waves)

    return _Mind(
        open_sequence=open_chain,
        vocab_size=head.vocab_size,
        batch=batch,
        open_adapted=open_adapted,
    )


def _adapters(mind: _Mind, records: Sequence[Record], num_blocks: int) -> dict[str, bytes]:
    """Adapters that servers of all blocks announce, by label; none that is ambiguous."""
    spans: dict[tuple[str, bytes], list[Span]] = {}
    for record in records if mind.open_adapted is not None else ():
        for one in record.adapters:
            spans.setdefault((one.label, one.name), []).append(Span(record.start, record.end))
    whole = [key for key, held in spans.items() if not missing_blocks(Span(0, num_blocks), held)]
    labels = [label for label, _ in whole]
    return {label: name for label, name in sorted(whole) if labels.count(label) == 1}


def context_tokens(config: Any, records: Sequence[Record], num_blocks: int) -> int:
    """The longest session that the model and the servers of today hold.

    Of each block the roomiest server counts. Nobody there: the model's own limit.
    """
    own = getattr(config, "max_position_embeddings", None)
    limit = own if isinstance(own, int) and own > 0 else SESSION_TOKENS_MAX
    for block in range(num_blocks):
        rooms = [
            min(record.session_tokens_max, record.cache_tokens)
            for record in records
            if record.start <= block < record.end and record.cache_tokens
        ]
        limit = min(limit, max(rooms, default=limit))
    return min(limit, SESSION_TOKENS_MAX)


def _records(snapshot: Snapshot, model: str) -> list[Record]:
    return [one.record for one in snapshot.records if one.record.model == model]


def _missing(records: Sequence[Record], num_blocks: int) -> list[tuple[int, int]]:
    held = [Span(one.start, one.end) for one in records if one.state != "joining"]
    return [(span.start, span.end) for span in missing_blocks(Span(0, num_blocks), held)]


def _head_batch(head: Head, exactness: Exactness, progress: Progress | None) -> HeadBatch:
    tiles = find_head_tiles(head, progress)
    if tiles is None and exactness == "auto":
        tiles = RowTiles(counts=tuple(range(1, TILE_ROWS_MAX + 1)), probe="")
    return HeadBatch(head, tiles)


def _watch(
    meter: Meter,
    client: Client | ThinClient,
    batch: HeadBatch | None,
    line: Line,
    kept: KeptSessions,
) -> None:
    gauges: dict[str, tuple[str, Callable[[], float]]] = {
        "running": ("Answers at work.", lambda: line.num_running),
        "waiting": ("Requests in the line.", lambda: line.num_waiting),
        "sessions": ("Sessions at servers.", lambda: client.num_sessions),
        "kept_sessions": ("Sessions at rest.", lambda: kept.num_sessions),
        "kept_session_tokens": ("Positions of sessions at rest.", lambda: kept.num_tokens),
    }
    if batch is not None:
        gauges["head_calls"] = ("How often the head was applied.", lambda: batch.num_calls)
        gauges["head_rows"] = ("To how many rows.", lambda: batch.num_rows)
    for name, (text, value) in gauges.items():
        meter.watch(f"shoal_gateway_{name}", text, value)


async def _sweep(kept: KeptSessions) -> None:
    clock = asyncio.get_running_loop().time
    while True:
        await asyncio.sleep(SWEEP_S)
        kept.expire(clock())
