"""What `shoal serve --with-head` adds: the head, and a client of the chain for its guests."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal.base.ids import short
from shoal.cli.joining import SwarmChoice, wall_clock
from shoal.cli.logs import progress_bar
from shoal.cli.models import OpenModel
from shoal.client.client import open_client
from shoal.client.config import ClientConfig
from shoal.client.head_service import HeadService
from shoal.discovery.directory import Directory
from shoal.hf.head import load_head
from shoal.hf.served_head import ServedHead, serve_head
from shoal.net.identity import Identity
from shoal.net.tcp import TcpTransport
from shoal.wire.tensors import INT8_BLOCK

logger = logging.getLogger(__name__)


@asynccontextmanager
async def serving_head(
    model: OpenModel, dtype: str, swarm: SwarmChoice, directory: Directory, identity: Identity
) -> AsyncIterator[HeadService]:
    """A service for thin clients inside the context; it is a client under `identity`.

    Raises:
        ModelError, ConfigError: the head can't be loaded, or the swarm does not let it in.
    """
    head = await _load(model, dtype)
    transport = TcpTransport(identity)
    config = ClientConfig(
        model=model.name, num_blocks=model.num_blocks, hidden_size=model.hidden_size
    )
    try:
        async with open_client(
            identity,
            transport,
            swarm.pass_for(identity),
            directory,
            config,
            rng=random.SystemRandom(),
            wall_clock=wall_clock,
        ) as client:
            logger.info("head ready numerics=%s client=%s",
                        head.facts.numerics, short(identity.peer))  # fmt: skip
            yield HeadService(head, client.open_session, compressed=INT8_BLOCK)
    finally:
        await transport.close()
        await head.aclose()


async def _load(model: OpenModel, dtype: str) -> ServedHead:
    head = await asyncio.to_thread(load_head, model.source, dtype=dtype)
    with progress_bar() as show:
        return await asyncio.to_thread(
            serve_head, head, dtype, lambda done, total: show("probing the head", done, total)
        )
