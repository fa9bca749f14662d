"""`shoal serve --placement petals|latency`: a server that goes where it does most good.

Here real parts are put together: the memory that is free, weights that load in a thread
beside those that serve, the directory, the loop that decides.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Final

import torch

from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import ConfigError
from shoal.base.ids import peer_text
from shoal.base.spans import Span
from shoal.cli.machine import look_at_machine
from shoal.cli.models import OpenModel
from shoal.cli.placing import PlaceChoice
from shoal.cli.sizes import size_text
from shoal.model.facts import kv_values
from shoal.model.parts import Parts, meta_model
from shoal.model.rows import torch_dtype
from shoal.model.span_model import block_bytes
from shoal.model.tiled_experts import has_experts
from shoal.model.torch_backend import BackendConfig
from shoal.server.announcing import Announcer
from shoal.server.moving import LoadBlocks, SpanMover
from shoal.server.rebalancing import Rebalancer, RebalanceTimes
from shoal.server.server import Server
from shoal.server.surroundings import ServerSurroundings
from shoal.server.switching import SwitchingBackend

logger = logging.getLogger(__name__)

SPARE: Final = 1.1
"""Loading holds a tensor or two twice; libraries round up."""

Fetch = Callable[[Span], Awaitable[None]]
"""Gets the weights of blocks to this machine, if they are not here."""

Load = Callable[[Span, BlockBackend], Awaitable[BlockBackend]]
"""Loads blocks; those that the backend has are shared with it."""


def check_room(
    model: OpenModel,
    span: Span,
    config: BackendConfig,
    free_bytes: int | None,
    served: Span | None = None,
) -> None:
    """See that blocks and a full KV cache for them fit beside what is loaded now.

    Those of `served` are there already, and are shared meanwhile unless they have experts.

    Raises:
        ConfigError: they don't; says how much is missing.
    """
    if free_bytes is None:
        return  # the system doesn't say
    sizes = block_bytes(model.source.config, config.dtype, config.quantize)
    token_bytes = torch_dtype(config.dtype).itemsize * sum(
        kv_values(model.source.config, block) for block in range(span.start, span.end)
    )
    parts = Parts(meta_model(model.source.config, torch_dtype(config.dtype)))
    kept = served if served is not None and not has_experts(parts.blocks) else Span(0, 0)
    weights = sum(sizes[block] for block in range(span.start, span.end) if block not in kept)
    need = int(SPARE * weights) + token_bytes * config.cache_tokens
    if need > free_bytes:
        raise ConfigError(
            f"blocks {span} and their KV cache need {size_text(need)} beside those that are "
            f"served, and {size_text(free_bytes)} are free; a smaller --cache-tokens or "
            "--num-blocks leaves room for moves"
        )


def free_memory(device: str) -> int | None:
    """Bytes that can be taken now where blocks live; None: unknown."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return look_at_machine().memory_free_bytes


def loader(
    model: OpenModel, config: BackendConfig, fetch: Fetch, load: Load, backend: SwitchingBackend
) -> LoadBlocks:
    """How a running server loads other blocks: if there is room, fetch them, then load."""

    async def load_beside(span: Span) -> BlockBackend:
        served = backend.facts.span
        await asyncio.to_thread(
            lambda: check_room(model, span, config, free_memory(config.device), served)
        )
        await fetch(span)
        return await load(span, backend.newest)

    return load_beside


def mover_of(
    server: Server, backend: SwitchingBackend, announcer: Announcer, load: LoadBlocks
) -> SpanMover:
    """What carries a move out; says on stdout when the new blocks are served."""

    async def announce(facts: BackendFacts) -> None:
        await announcer.moved(facts)
        where = announcer.announcement.addresses[0]
        print(
            f"moved peer={peer_text(server.peer)} address={where} blocks={facts.span}", flush=True
        )

    async def tidy() -> None:
        await asyncio.to_thread(gc.collect)  # modules hold each other in circles

    return SpanMover(server, backend, load, announce, tidy=tidy)


async def keep_placed(choice: PlaceChoice, around: ServerSurroundings) -> None:
    """Move the server whenever that is good for the swarm, until cancelled.

    Raises:
        ConfigError: nobody would accept our record.
    """
    rebalancer = Rebalancer(
        choice.policy,
        around.server.peer,
        around,
        random.SystemRandom(),
        RebalanceTimes(period_s=choice.period_s),
        think=asyncio.to_thread,
    )
    logger.info("places itself policy=%s period_s=%g", choice.policy, choice.period_s)
    await rebalancer.run()
