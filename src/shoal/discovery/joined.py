"""The joined directory: it asks the peers that `--join` names, and those it learns of.

For swarms of some dozens of servers: everybody hands its own record to everybody. Gossip
will replace this behind the same contract. Peers are believed nothing: a record counts
only with its subject's signature.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from shoal.base.errors import ConfigError, PeerTimeout, PeerUnreachable, ShoalError
from shoal.base.ids import PeerId, short
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.discovery.directory import Snapshot
from shoal.discovery.exchange import fetch_from, publish_to
from shoal.discovery.static import accept_own
from shoal.discovery.store import RecordStore
from shoal.discovery.watch import Watch
from shoal.net.address import Address, parse_address
from shoal.net.channel import PURPOSE_CONTROL, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport

logger = logging.getLogger(__name__)

ASKED_MAX: Final = 8
"""Servers, besides the joins, that are asked for all they know in one round: every server
hands its record to every other, so a few answers hold everything."""

CONCURRENT_MAX: Final = 16
"""Peers that are talked to at the same time: dialling is a burst of public-key work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinConfig:
    """How a JoinedDirectory behaves."""

    swarm_pass: SwarmPass
    joins: tuple[Address, ...] = ()
    """Peers to ask first; none for the first server of a swarm."""
    period_s: float = 30.0
    """Rounds are this far apart: a server that joined elsewhere is seen this late."""

    def __post_init__(self) -> None:
        if self.period_s <= 0:
            raise ConfigError(f"the period must be above 0 s, not {self.period_s}")


@dataclass(frozen=True, slots=True)
class _Target:
    peer: PeerId
    addresses: tuple[Address, ...]
    is_asked: bool


class JoinedDirectory:
    """A Directory kept by asking others. Use as an async context manager.

    Its `store` also answers those who ask us (`exchange.answer_directory`). It never
    signs: a server publishes a new record before its last one expires.
    """

    def __init__(self, transport: Transport, config: JoinConfig, rng: random.Random) -> None:
        self.store = RecordStore(config.swarm_pass.name)
        self.failures: dict[PeerId, ShoalError] = {}
        """Peers that did not answer when last asked, and why."""
        self._transport = transport
        self._config = config
        self._rng = rng
        self._watch = Watch(self.store)
        self._own: bytes | None = None
        self._rounds: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask the joins, then those they know; then go on doing so until `close`.

        Raises:
            PeerUnreachable: joins are given and none of them answers; names each.
        """
        joins = _by_peer(self._config.joins, self._transport.peer)
        await self._visit(joins)
        if joins and all(target.peer in self.failures for target in joins):
            reasons = "; ".join(
                f"{target.addresses[0]}: {self.failures[target.peer]}" for target in joins
            )
            raise PeerUnreachable(f"none of the peers to join answers: {reasons}")
        await self.refresh(skip=frozenset(target.peer for target in joins))
        self._rounds = asyncio.get_running_loop().create_task(
            self._repeat(), name=f"directory/{short(self._transport.peer)}"
        )

    async def close(self) -> None:
        """Stop asking. What is known stays readable."""
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
            self._rounds = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def publish(self, data: bytes) -> None:
        """Hand a record of ours to every server that is known, and to later ones.

        Peers that can't be reached now get it in a later round.

        Raises:
            ConfigError: not a valid record of this peer and swarm, or not later than our
                last.
        """
        accept_own(self.store, data, self._transport.peer)
        self._own = data
        await self.refresh()

    def snapshot(self) -> Snapshot:
        """What is known now."""
        return self._watch.snapshot()

    async def changed(self, version: int) -> Snapshot:
        """A snapshot whose version is not `version`; waits for one. Safe to cancel."""
        return await self._watch.changed(version)

    async def refresh(self, *, skip: frozenset[PeerId] = frozenset()) -> None:
        """Ask everybody now, those that are learned of on the way too; tolerates failures.

        `skip` names peers that need not be asked.
        """
        known = {target.peer for target in self._targets(frozenset())}
        self.failures = {peer: why for peer, why in self.failures.items() if peer in known}
        while targets := self._targets(skip):
            await self._visit(targets)
            skip |= {target.peer for target in targets}

    def _targets(self, skip: frozenset[PeerId]) -> list[_Target]:
        """Whom to visit: all joins and servers; the joins and a few servers are asked."""
        targets = _by_peer(self._config.joins, self._transport.peer)
        done = skip | {target.peer for target in targets} | {self._transport.peer}
        targets = [target for target in targets if target.peer not in skip]
        servers = [
            one.record for one in self.snapshot().records if PeerId(one.record.peer) not in done
        ]
        asked = {one.peer for one in self._rng.sample(servers, min(ASKED_MAX, len(servers)))}
        for record in servers:
            addresses = tuple(parse_address(text) for text in record.addresses)
            targets.append(_Target(PeerId(record.peer), addresses, record.peer in asked))
        return targets

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._config.period_s)
            try:
                await self.refresh()
            except Exception:
                logger.exception("directory round failed")

    async def _visit(self, targets: Sequence[_Target]) -> None:
        """Talk to each, a few at a time; `failures` says how it went."""
        slots = asyncio.Semaphore(CONCURRENT_MAX)
        async with asyncio.TaskGroup() as group:
            for target in targets:
                if target.is_asked or self._own is not None:
                    group.create_task(self._visit_one(target, slots))

    async def _visit_one(self, target: _Target, slots: asyncio.Semaphore) -> None:
        async with slots:
            for address in target.addresses:
                try:
                    async with asyncio.timeout(CALL_TIMEOUT_S):
                        await self._talk(address, target.is_asked)
                except TimeoutError:
                    self.failures[target.peer] = PeerTimeout(
                        f"no full answer within {CALL_TIMEOUT_S:g} s"
                    )
                except ShoalError as error:
                    self.failures[target.peer] = error
                else:
                    self.failures.pop(target.peer, None)
                    return
        logger.info(
            "peer not visited peer=%s reason=%s", short(target.peer), self.failures[target.peer]
        )

    async def _talk(self, address: Address, is_asked: bool) -> None:
        clock = asyncio.get_running_loop().time
        channel = await open_channel(
            self._transport, address, PURPOSE_CONTROL, self._config.swarm_pass
        )
        try:
            if self._own is not None:
                await publish_to(channel, self._own, self.store, clock())
            if is_asked:
                await fetch_from(channel, self.store, clock())
        finally:
            channel.close()


def _by_peer(addresses: Iterable[Address], own: PeerId) -> list[_Target]:
    """The joins, by peer, in the order given; without ourselves."""
    by_peer: dict[PeerId, list[Address]] = {}
    for address in addresses:
        if address.peer != own:
            by_peer.setdefault(address.peer, []).append(address)
    return [_Target(peer, tuple(found), True) for peer, found in by_peer.items()]
