"""A whole swarm in this process: real servers on real blocks, without a network.

For trying things out, for notebooks, examples and tests. It holds the whole model, so it
proves nothing about speed.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.client.client import open_client
from shoal.client.config import ClientConfig
from shoal.discovery.records import Adapter, Record, sign_record
from shoal.discovery.static import StaticDirectory
from shoal.discovery.store import RecordStore
from shoal.hf.connection import Visit, wall_clock
from shoal.hf.loop import BackgroundLoop
from shoal.model.adapter_files import read_peft
from shoal.model.families import num_blocks
from shoal.model.hub import Hub
from shoal.model.known import default_cache_dir
from shoal.model.manifest import model_hash
from shoal.model.source import ModelSource, open_source
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.net.address import ListenAddress
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.memory import SCHEME, MemoryNetwork
from shoal.server.announcing import StoreBook
from shoal.server.server import open_server

SWARM: Final = "local"
CACHE_TOKENS: Final = 8192
RECORD_TTL_S: Final = 600.0
"""Of no effect: a lasting directory keeps records for good."""


class LocalSwarm:
    """Servers in this process; pass it as `join`. A context manager.

    Args:
        model: as for `from_pretrained`.
        borders: where one server's span ends and the next one's begins; from 0 to the
            number of blocks. Default: three spans of about equal length.
        spans: (start, end) of each server instead, with gaps and overlaps as you like.
        replicas: servers of each span.
        dtype: what they compute in.
        cache_dir: where known models are kept (default: ~/.cache/shoal).
        adapters: directories of LoRA adapters that all servers have, by name.
    """

    def __init__(
        self,
        model: str | Path | ModelSource,
        *,
        borders: Sequence[int] | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        replicas: int = 1,
        dtype: str = "float32",
        cache_dir: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> None:
        """Load everything and serve.

        Raises:
            ConfigError: borders or a dtype that can't be.
            ModelError: unknown, broken or unsupported.
            AdapterBad: a directory without an adapter that can be used.
        """
        directory = default_cache_dir({}) if cache_dir is None else Path(cache_dir)
        source = open_source(model, directory, Hub()) if isinstance(model, str | Path) else model
        blocks = num_blocks(source.config)
        served = _spans(borders, blocks) if spans is None else [Span(*span) for span in spans]
        config = BackendConfig(
            model=model_hash(source, directory), dtype=dtype, cache_tokens=CACHE_TOKENS
        )
        self._adapters = {
            label: read_peft(Path(place), source.config)
            for label, place in (adapters or {}).items()
        }
        self._peers: list[PeerId] = []
        self._stack = AsyncExitStack()
        self._loop = BackgroundLoop("shoal local swarm")
        try:
            backends = [load_backend(source, span, config) for span in served * replicas]
            self._loop.run(self._start(backends))
        except BaseException:
            self._loop.close()
            raise

    @property
    def peers(self) -> tuple[PeerId, ...]:
        """The servers, in the order of their spans, one replica after the other."""
        return tuple(self._peers)

    def loop(self) -> BackgroundLoop | None:
        """The loop of the servers: the memory network is for one loop only."""
        return self._loop

    @asynccontextmanager
    async def visit(self, config: ClientConfig) -> AsyncIterator[Visit]:
        """A client of these servers."""
        identity = Identity.generate()
        transport = self._network.transport(identity.peer)
        try:
            async with open_client(
                identity, transport, SwarmPass.open(SWARM), self._directory, config,
                rng=random.Random(os.urandom(16)), wall_clock=wall_clock,
            ) as client:  # fmt: skip
                yield Visit(client=client, snapshot=self._directory.snapshot())
        finally:
            await transport.close()

    def crash(self, peer: PeerId) -> None:
        """End a server without a farewell, to see sessions being repaired."""
        self._loop.run(self._crash(peer))

    def close(self) -> None:
        """Stop all servers; models that joined should be closed before. Idempotent."""
        if self._loop.is_running:
            self._loop.run(self._stack.aclose())
            self._loop.close()

    def __enter__(self) -> LocalSwarm:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def _start(self, backends: Sequence[BlockBackend]) -> None:
        self._network = MemoryNetwork()
        self._directory = StaticDirectory(SWARM, is_lasting=True)
        for backend in backends:
            self._stack.push_async_callback(backend.aclose)
        for index, backend in enumerate(backends):
            await self._serve(f"server-{index}", backend)

    async def _serve(self, name: str, backend: BlockBackend) -> None:
        identity = Identity.generate()
        transport = self._network.transport(identity.peer)
        self._stack.push_async_callback(transport.close)
        book = StoreBook(RecordStore(SWARM))
        server = await self._stack.enter_async_context(
            open_server(backend, transport, SwarmPass.open(SWARM), book)
        )
        for label, part in self._adapters.items():
            await server.adapters.add_own(label, part)
        listener = await transport.listen(ListenAddress(SCHEME, name, 1), server.serve_stream)
        said = [Adapter(*one) for one in server.adapters.labels.items()]
        record = _record(identity.peer, str(listener.address), backend.facts, said)
        await self._directory.publish(sign_record(identity, record))
        self._peers.append(identity.peer)

    async def _crash(self, peer: PeerId) -> None:
        self._network.crash(peer)
        await asyncio.sleep(0)


def _spans(borders: Sequence[int] | None, blocks: int) -> list[Span]:
    if borders is None:
        count = min(3, blocks)
        borders = [index * blocks // count for index in range(count + 1)]
    chosen = list(borders)
    if len(chosen) < 2 or sorted(set(chosen)) != chosen or (chosen[0], chosen[-1]) != (0, blocks):
        raise ConfigError(f"borders {chosen}: give rising numbers, from 0 to {blocks}")
    return [Span(start, end) for start, end in pairwise(chosen)]


def _record(peer: PeerId, address: str, facts: BackendFacts, adapters: list[Adapter]) -> Record:
    return Record(
        peer=peer,
        swarm=SWARM,
        boot_ms=1,
        counter=1,
        ttl_s=RECORD_TTL_S,
        state="online",
        addresses=[address],
        model=facts.model,
        num_blocks=facts.num_blocks,
        hidden_size=facts.hidden_size,
        start=facts.span.start,
        end=facts.span.end,
        numerics=facts.numerics,
        is_exact=facts.is_exact,
        encodings=list(facts.encodings),
        cache_tokens=facts.cache_tokens,
        adapters=adapters,
    )
