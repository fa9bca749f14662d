"""What `--thin` needs: a client that asks head servers, for one model."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal.cli.joining import Visitor
from shoal.cli.models import OpenModel
from shoal.client.thin import ThinClient, ThinConfig, open_thin_client
from shoal.client.waiting import OnWaiting


@asynccontextmanager
async def open_swarm_thin_client(
    visitor: Visitor,
    model: OpenModel,
    patience_s: float,
    *,
    encoding: str,
    is_compressed: bool,
    on_waiting: OnWaiting | None = None,
) -> AsyncIterator[ThinClient]:
    """A thin client of the visitor's swarm. Nothing is sent before a session has tokens."""
    config = ThinConfig(
        model=model.name,
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        vocab_size=vocab_size(model),
        patience_s=patience_s,
        encoding=encoding,
        is_compressed=is_compressed,
        on_waiting=on_waiting,
    )
    async with open_thin_client(
        visitor.transport, visitor.swarm_pass, visitor.directory, config, random.SystemRandom()
    ) as client:
        yield client


def vocab_size(model: OpenModel) -> int:
    """Rows of the model's embedding, by its configuration."""
    return int(model.source.config.get_text_config().vocab_size)
