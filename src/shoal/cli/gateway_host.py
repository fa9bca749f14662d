"""What `shoal gateway` does: join, load the head, listen, answer until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import AsyncExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from shoal.base.errors import ConfigError
from shoal.cli.answering import check_model, common_encoding, open_swarm_client
from shoal.cli.chat_host import end_tokens
from shoal.cli.joining import SwarmChoice, visit, wall_clock
from shoal.cli.models import OpenModel
from shoal.gateway.front import LOOPBACK
from shoal.gateway.keys import Keys
from shoal.gateway.line import LineConfig
from shoal.gateway.listening import Listening, serving
from shoal.gateway.opening import Backing, GatewayConfig, open_gateway
from shoal.hf.head import load_head
from shoal.wire.tensors import INT8_BLOCK

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """What `shoal gateway` was asked to do, checked."""

    swarm: SwarmChoice
    model: OpenModel
    listening: Listening
    keys: Keys
    names: tuple[str, ...]
    line: LineConfig
    kept_tokens: int | None
    exactness: Literal["auto", "always"]
    template: str | None
    dtype: str | None
    """None: what most servers compute in."""
    is_compressed: bool
    patience_s: float


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


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
    loop = asyncio.get_running_loop()
    work = loop.create_task(_run(settings), name="gateway")
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        logger.info("stopped by a signal")
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _run(settings: GatewaySettings) -> None:
    model, host = settings.model, settings.listening.host
    tokenizer = await asyncio.to_thread(model.source.tokenizer)
    async with AsyncExitStack() as stack:
        visitor = await stack.enter_async_context(visit(settings.swarm))
        snapshot = visitor.directory.snapshot()
        check_model(snapshot, model)
        encoding = settings.dtype or common_encoding(snapshot, model.name)
        head = await asyncio.to_thread(load_head, model.source, dtype=encoding)
        client = await stack.enter_async_context(
            open_swarm_client(visitor, model, settings.patience_s)
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
            hosts=LOOPBACK if is_loopback(host) else None,
        )
        app = await stack.enter_async_context(open_gateway(backing, config, wall_clock))
        url = await stack.enter_async_context(serving(app, settings.listening))
        if settings.listening.certificate is None and not is_loopback(host):
            logger.warning(
                "texts and keys travel in the clear: add --tls-certificate and --tls-key"
            )
        print(f"ready url={url} model={settings.names[0]}", flush=True)
        await asyncio.Event().wait()
