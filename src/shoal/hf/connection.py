"""A running client for code that is not async: where it comes from, how it ends.

`Joining` describes a swarm to join over the network; `shoal.hf.local_swarm` is the other
kind of place to get a client from. Both are `Place`s.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from shoal.base.errors import ConfigError, NoRouteError, SessionClosed
from shoal.base.spans import Span, missing_blocks
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.discovery.directory import Snapshot
from shoal.discovery.gossip import GossipConfig, GossipDirectory
from shoal.hf.loop import BackgroundLoop
from shoal.net.address import Address, parse_address
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass, join_by_invite
from shoal.net.tcp import TcpTransport

DEFAULT_SWARM: Final = "default"
"""The swarm of those who name none; as on the command line."""

FALLBACK_ENCODING: Final = "float32"
"""When no server says what it computes in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A client in a swarm, and what was known of the swarm when it came."""

    client: Client
    snapshot: Snapshot


class Place(Protocol):
    """Where a client can be had."""

    def loop(self) -> BackgroundLoop | None:
        """The loop that the client must run on; None: one of its own."""

    def visit(self, config: ClientConfig) -> AbstractAsyncContextManager[Visit]:
        """A client that runs inside the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """A swarm on the network."""

    joins: tuple[Address, ...]
    swarm: str | None = None
    invite: str | None = None

    @classmethod
    def parse(cls, join: str | Sequence[str], swarm: str | None, invite: str | None) -> Joining:
        """Check what a person gave.

        Raises:
            ConfigError: no address, a malformed one, or both a name and an invite.
        """
        texts = [join] if isinstance(join, str) else list(join)
        if not texts:
            raise ConfigError("no server named: give join=ADDRESS, from a server's ready line")
        if swarm is not None and invite is not None:
            raise ConfigError("swarm and invite: give one; an invite names its swarm itself")
        joins = tuple(parse_address(text) for text in texts)
        return cls(joins=joins, swarm=swarm, invite=invite)

    def loop(self) -> BackgroundLoop | None:
        """None: any loop will do."""
        return None

    @asynccontextmanager
    async def visit(self, config: ClientConfig) -> AsyncIterator[Visit]:
        """A client under a fresh identity, once it knows the swarm.

        Raises:
            ConfigError: the invite or the name is no good.
            PeerUnreachable: none of the joins answers.
        """
        identity = Identity.generate()
        if self.invite is not None:
            swarm_pass = join_by_invite(self.invite, identity, clock=wall_clock)
        else:
            swarm_pass = SwarmPass.open(self.swarm or DEFAULT_SWARM)
        transport = TcpTransport(identity)
        join = GossipConfig(swarm_pass=swarm_pass, joins=self.joins, is_reader=True)
        rng = random.SystemRandom()
        try:
            async with (
                GossipDirectory(transport, join, rng) as directory,
                open_client(
                    identity, transport, swarm_pass, directory, config, rng=rng,
                    wall_clock=wall_clock,
                ) as client,
            ):  # fmt: skip
                yield Visit(client=client, snapshot=directory.snapshot())
        finally:
            await transport.close()


class Connection:
    """A client on a background loop, until `close`."""

    def __init__(self, place: Place, config: ClientConfig) -> None:
        """Connect; blocks until the swarm is known.

        Raises:
            ConfigError, PeerError: as the place's `visit`.
        """
        shared = place.loop()
        self.loop = shared or BackgroundLoop("shoal client")
        self._is_loop_ours = shared is None
        self._lock = threading.Lock()
        self._is_closed = False
        try:
            self._stop, self._task, self.visit = self.loop.run(_open(place, config))
        except BaseException:
            if self._is_loop_ours:
                self.loop.close()
            raise

    def check_open(self) -> None:
        """Raise SessionClosed after `close`."""
        if self._is_closed:
            raise SessionClosed("the model was closed: open it again with from_pretrained")

    def close(self) -> None:
        """Close the client, its sessions and streams. Idempotent; from any thread."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self.loop.is_own_thread:
            # The garbage collector may call from the loop itself, which can't wait for itself.
            threading.Thread(target=self._end, name="shoal close", daemon=True).start()
        else:
            self._end()

    def _end(self) -> None:
        if self.loop.is_running:
            self.loop.run(_close(self._stop, self._task))
        if self._is_loop_ours:
            self.loop.close()


async def _open(
    place: Place, config: ClientConfig
) -> tuple[asyncio.Event, asyncio.Task[None], Visit]:
    stop = asyncio.Event()
    opened: asyncio.Future[Visit] = asyncio.get_running_loop().create_future()

    async def keep() -> None:
        # One task enters and leaves the context, as task groups inside it must have it.
        try:
            async with place.visit(config) as visit:
                opened.set_result(visit)
                await stop.wait()
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)

    task = asyncio.get_running_loop().create_task(keep(), name="shoal connection")
    try:
        return stop, task, await opened
    except BaseException:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise


async def _close(stop: asyncio.Event, task: asyncio.Task[None]) -> None:
    stop.set()
    await task


def check_model(snapshot: Snapshot, *, given: str, model: str, num_blocks: int) -> None:
    """Refuse at once what can't work: the swarm serves other models, not this one.

    Raises:
        ConfigError: names them and ours.
    """
    records = [one.record for one in snapshot.records]
    if records and all(record.model != model for record in records):
        others = {record.model: record.num_blocks for record in records}
        served = "; ".join(f"{name} ({blocks} blocks)" for name, blocks in others.items())
        raise ConfigError(
            f"the swarm serves model {served}, but {given} is model {model} "
            f"({num_blocks} blocks): give the same model as the servers"
        )


def check_served(snapshot: Snapshot, *, given: str, model: str, num_blocks: int) -> None:
    """Refuse a model that nobody serves, or not all of its blocks.

    Servers that are still joining count: sessions wait for them.

    Raises:
        ConfigError: as `check_model`.
        NoRouteError: blocks are missing; names them.
    """
    check_model(snapshot, given=given, model=model, num_blocks=num_blocks)
    records = [one.record for one in snapshot.records]
    spans = [Span(record.start, record.end) for record in records if record.model == model]
    missing = missing_blocks(Span(0, num_blocks), spans)
    if missing:
        names = ", ".join(str(span) for span in missing)
        raise NoRouteError(
            f"no server has blocks {names} of {given}: start one with "
            f"shoal serve --blocks {missing[0].start}:{missing[0].end} --join ...",
            missing=[(span.start, span.end) for span in missing],
        )


def common_encoding(snapshot: Snapshot, model: str) -> str:
    """The encoding that most servers of the model compute in."""
    counts = Counter(
        one.record.encodings[0]
        for one in snapshot.records
        if one.record.model == model and one.record.encodings
    )
    return counts.most_common(1)[0][0] if counts else FALLBACK_ENCODING


def wall_clock() -> float:
    """Unix time in seconds, for statements that others compare with their own clocks."""
    return time.time()  # noqa: TID251 - a library call is where clocks enter, like a command
