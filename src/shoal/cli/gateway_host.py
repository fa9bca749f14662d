"""What `shoal gateway` does: join, load the head, listen, answer until it is stopped."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal

from shoal.base.errors import ConfigError
from shoal.base.ids import peer_text, short
from shoal.cli.answering import check_model, common_encoding, open_swarm_client
from shoal.cli.chat_host import end_tokens
from shoal.cli.dashboard_host import looking
from shoal.cli.gateway_web import LOOPBACK, is_loopback, until_stopped
from shoal.cli.joining import SwarmChoice, visit, wall_clock
from shoal.cli.logs import progress_bar
from shoal.cli.models import OpenModel
from shoal.cli.thin_host import open_swarm_thin_client
from shoal.client.client import Client
from shoal.client.session import Recovery
from shoal.client.thin import ThinClient
from shoal.dashboard import app as dashboard
from shoal.dashboard.events import Event
from shoal.dashboard.observer import Observer, observing
from shoal.gateway.keys import Keys
from shoal.gateway.line import LineConfig
from shoal.gateway.listening import Listening, serving
from shoal.gateway.opening import Backing, Extras, GatewayConfig, open_gateway
from shoal.hf.head import Head, load_head
from shoal.wire.tensors import INT8_BLOCK

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What `shoal gateway` was asked to do, checked."""

    swarm: SwarmChoice
    model: OpenModel
    listening: Listening
    keys: Keys
    is_open: bool
    """Whether others may reach it: they need a key, or everybody may ask."""
    names: tuple[str, ...]
    line: LineConfig
    kept_tokens: int | None
    exactness: Literal["auto", "always"]
    template: str | None
    dtype: str | None
    """None: what most servers compute in."""
    is_compressed: bool
    patience_s: float
    standby: int = 0
    """Standbys for each hop."""
    is_thin: bool = False
    """Whether servers embed and choose tokens."""
    dispatch: Literal["each", "chains"] = "each"
    """Who chooses chains."""


def check_open(host: str, *, is_open: bool) -> None:
    """Refuse to let a whole network in by accident.

    Raises:
        ConfigError: others reach the host, and they need no key.
    """
    if not is_open and not is_loopback(host):
        raise ConfigError(
            f"--listen {host}: others could use it without a key; add --api-keys FILE, or --open "
            "if everybody may"
        )


async def run_until_stopped(settings: GatewaySettings) -> None:
    """Answer until SIGINT or SIGTERM; answers that are being written get a few seconds.

    Raises:
        ConfigError: another model than the swarm's, or an address that can't be had.
        PeerError: the swarm can't be reached.
    """
    await until_stopped(_run(settings))


async def _run(settings: GatewaySettings) -> None:
    model, host = settings.model, settings.listening.host
    tokenizer = await asyncio.to_thread(model.source.tokenizer)
    async with AsyncExitStack() as stack:
        visitor = await stack.enter_async_context(visit(settings.swarm))
        snapshot = visitor.directory.snapshot()
        check_model(snapshot, model)
        encoding = settings.dtype or common_encoding(snapshot, model.name)
        head: Head | None = None
        client: Client | ThinClient
        if settings.is_thin:
            client = await stack.enter_async_context(
                open_swarm_thin_client(
                    visitor, model, settings.patience_s, encoding=encoding,
                    is_compressed=settings.is_compressed,
                )
            )  # fmt: skip
        else:
            head = await asyncio.to_thread(load_head, model.source, dtype=encoding)
            client = await stack.enter_async_context(
                open_swarm_client(visitor, model, settings.patience_s, standby=settings.standby)
            )
        backing = Backing(
            client=client,
            head=head,
            encoding=encoding,
            inner_encoding=INT8_BLOCK if settings.is_compressed else None,
            tokenizer=tokenizer,
            end_ids=end_tokens(model, tokenizer),
            config=model.source.config,
            snapshot=visitor.directory.snapshot,
        )
        config = GatewayConfig(
            names=settings.names,
            keys=settings.keys,
            line=settings.line,
            kept_tokens=settings.kept_tokens,
            exactness=settings.exactness,
            template=settings.template,
            # A key is more than any page of another site has; a proxy before us has its own name.
            dispatch=settings.dispatch,
            hosts=LOOPBACK if is_loopback(host) and not settings.is_open else None,
        )
        observer = await stack.enter_async_context(observing(looking(visitor), wall_clock))
        with progress_bar() as show:
            extras = Extras(
                routes=dashboard.routes(observer),
                on_repair=partial(_tell, observer, model.name),
                on_progress=partial(show, "probing the head"),
            )
            app = await stack.enter_async_context(open_gateway(backing, config, wall_clock, extras))
        url = await stack.enter_async_context(serving(app, settings.listening, extras.closing))
        if settings.listening.certificate is None and not is_loopback(host):
            logger.warning(
                "texts and keys travel in the clear: add --tls-certificate and --tls-key"
            )
        print(f"ready url={url} model={settings.names[0]}", flush=True)
        await asyncio.Event().wait()


def _tell(observer: Observer, model: str, recovery: Recovery) -> None:
    lost = ", ".join(short(peer) for peer in recovery.lost) or "a link"
    found = ", ".join(short(peer) for peer in recovery.replacement)
    text = (
        f"an answer's chain was repaired: {lost} replaced{f' by {found}' if found else ''}, "
        f"{recovery.replayed_tokens} tokens replayed, {recovery.pause_s:.2f} s"
    )
    peer = peer_text(recovery.lost[0]) if recovery.lost else ""
    observer.note(Event(kind="repaired", text=text, model=model, peer=peer))
