"""The gossip directory: who is here, kept in step with a few neighbours over open streams.

`Gossiper` decides; this carries it out with a transport, and reads the directories of two
peers at the start. Servers answer gossip streams; clients only dial. Peers are believed
nothing: a record counts only with its subject's signature.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from shoal.base.errors import (
    PeerBusy,
    PeerMisbehaved,
    PeerRefused,
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
    VersionMismatch,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.discovery.directory import Snapshot
from shoal.discovery.exchange import fetch_from
from shoal.discovery.gossip_link import GossipLink
from shoal.discovery.gossiper import REDIAL_S, TICK_S, Gossiper
from shoal.discovery.neighbourhood import Action, Dial, Drop, Send
from shoal.discovery.static import accept_own
from shoal.discovery.store import RecordStore
from shoal.discovery.watch import Watch
from shoal.net.address import Address, parse_address
from shoal.net.channel import PURPOSE_CONTROL, PURPOSE_GOSSIP, Channel, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.tasks import TaskSet
from shoal.net.transport import Transport
from shoal.wire.gossip import Taken
from shoal.wire.messages import Error, Message

logger = logging.getLogger(__name__)

READ_FROM: Final = 2
"""Peers whose whole directories are read at the start: one alone could hide servers."""

READ_TRIES: Final = 3
"""Servers, besides the joins, that are tried for that."""

READER_DELAY_S: Final = 1.0
"""A client dials neighbours after this: a command that only looks is over by then."""

SETTLE_S: Final = 1.0
"""How long a publication waits for neighbours that are being dialled."""

FAILURES_MAX: Final = 256
"""Failures that are remembered, for people and tests."""

FAREWELL_S: Final = 0.5
"""How long `close` waits for its neighbours to hear that we part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GossipConfig:
    """How a GossipDirectory behaves."""

    swarm_pass: SwarmPass
    joins: tuple[Address, ...] = ()
    """Peers to ask first; none for the first server of a swarm."""
    is_reader: bool = False
    """A client: it reads from two neighbours that it dials, and publishes nothing."""


class GossipDirectory:
    """A Directory kept by gossip. Use as an async context manager.

    It never signs: a server publishes a new record before its last one expires, and when
    `suspected` returns.
    """

    def __init__(self, transport: Transport, config: GossipConfig, rng: random.Random) -> None:
        self.store = RecordStore(config.swarm_pass.name)
        self.failures: dict[PeerId, ShoalError] = {}
        """Peers that did not answer when last dialled, and why."""
        self._transport = transport
        self._config = config
        self._rng = rng
        self._watch = Watch(self.store)
        self._joins = _by_peer(config.joins, transport.peer)
        self.gossiper = Gossiper(
            transport.peer,
            self.store,
            rng,
            joins={p: tuple(map(str, found)) for p, found in self._joins.items()},
            is_reader=config.is_reader,
        )
        self._links: dict[PeerId, GossipLink] = {}
        self._running: set[GossipLink] = set()
        """All streams that are open, those that we part from too."""
        self._tasks = TaskSet(f"gossip {short(transport.peer)}")
        self._ticks: asyncio.Task[None] | None = None
        self._calls = 0
        self._untaken: dict[int, set[PeerId]] = {}
        """For each record that we publish, who has not taken it yet."""
        self._progress = asyncio.Event()
        self._suspected = asyncio.Event()

    async def start(self) -> None:
        """Read what the joins know, and somebody else; then gossip until `close`.

        Raises:
            PeerUnreachable: joins are given and none of them answers; names each.
        """
        joins = list(self._joins.items())
        await self._read_all(joins)
        if joins and all(peer in self.failures for peer in self._joins):
            reasons = "; ".join(f"{found[0]}: {self.failures[peer]}" for peer, found in joins)
            raise PeerUnreachable(f"none of the peers to join answers: {reasons}")
        if joins:
            await self._read_more()
        self._ticks = self._tasks.spawn(self._tick(), "ticks")

    async def close(self) -> None:
        """Part from the neighbours and stop. What is known stays readable. Idempotent."""
        if self._ticks is not None:
            self._ticks.cancel()  # or it would dial others in place of those we part from
        self._do(self.gossiper.farewell())
        try:
            async with asyncio.timeout(FAREWELL_S):
                while self._running:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            logger.debug("neighbours did not hear our farewell count=%d", len(self._running))
        for link in self._running:
            link.close()
        await self._tasks.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # --- Directory --------------------------------------------------------------------

    async def publish(self, data: bytes) -> None:
        """Hand a record of ours to all neighbours, who tell the others.

        Returns when they have it; those that can't be reached now get it later.

        Raises:
            ConfigError: not a valid record of this peer and swarm, or not later than our
                last.
        """
        accept_own(self.store, data, self._transport.peer)
        self._suspected.clear()
        await self._wait_for_neighbours()
        signed = self.store.find(self._transport.peer)
        if signed is None or signed.data != data:
            return  # a later one was published meanwhile
        self._calls += 1
        call = self._calls
        told, actions = self.gossiper.publish(signed, call, self._now_s())
        self._untaken[call] = set(told)
        self._do(actions)
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                while self._untaken[call]:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            logger.info("record not taken by all count=%d", len(self._untaken[call]))
        finally:
            del self._untaken[call]

    def snapshot(self) -> Snapshot:
        """What is known now."""
        return self._watch.snapshot()

    async def changed(self, version: int) -> Snapshot:
        """A snapshot whose version is not `version`; waits for one. Safe to cancel."""
        return await self._watch.changed(version)

    async def suspected(self) -> None:
        """Return when a peer says that we have gone: a new record of ours refutes it."""
        await self._suspected.wait()
        self._suspected.clear()

    # --- reading at the start -----------------------------------------------------------

    async def _read_more(self) -> None:
        """Read a second directory, if only one has answered."""
        for _ in range(READ_TRIES):
            others = [
                one.record
                for one in self.snapshot().records
                if PeerId(one.record.peer) not in {*self._joins, *self.failures}
                and one.record.peer != self._transport.peer
            ]
            num_read = sum(peer not in self.failures for peer in self._joins)
            if num_read >= READ_FROM or not others:
                return
            record = self._rng.choice(others)
            peer = PeerId(record.peer)
            await self._read_all([(peer, tuple(map(parse_address, record.addresses)))])
            if peer not in self.failures:
                return

    async def _read_all(self, peers: Sequence[tuple[PeerId, tuple[Address, ...]]]) -> None:
        async with asyncio.TaskGroup() as group:
            for peer, addresses in peers:
                group.create_task(self._read_one(peer, addresses))

    async def _read_one(self, peer: PeerId, addresses: tuple[Address, ...]) -> None:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                channel = await self._open(addresses, PURPOSE_CONTROL)
                try:
                    await fetch_from(channel, self.store, self._now_s())
                finally:
                    channel.close()
        except TimeoutError:
            self.failures[peer] = PeerTimeout(f"no full answer within {CALL_TIMEOUT_S:g} s")
        except ShoalError as error:
            self.failures[peer] = error
        else:
            self.failures.pop(peer, None)
            return
        logger.info("peer not read peer=%s reason=%s", short(peer), self.failures[peer])

    async def _open(self, addresses: Iterable[Address], purpose: str) -> Channel:
        error: ShoalError = PeerUnreachable("it has no address")
        for address in addresses:
            try:
                return await open_channel(
                    self._transport, address, purpose, self._config.swarm_pass
                )
            except ShoalError as failure:
                error = failure
        raise error

    # --- gossip ------------------------------------------------------------------------

    async def serve(self, channel: Channel) -> None:
        """Be the neighbour of a peer that dialled us, until one of us has enough."""
        reason = self.gossiper.admits(channel.peer, self._now_s())
        if reason or self._tasks.is_closed:
            await channel.refuse(PeerBusy(reason or "leaving", retry_after_s=REDIAL_S))
        elif self.gossiper.prefers_new(channel.peer, is_dialled=False):
            await self._keep_in_touch(channel, is_dialled=False)
        else:
            channel.close()

    def meet(self, addresses: Sequence[Address]) -> None:
        """Take addresses of one peer as those of a join."""
        self.gossiper.meet(addresses[0].peer, tuple(map(str, addresses)))

    async def _tick(self) -> None:
        if self._config.is_reader:
            await asyncio.sleep(READER_DELAY_S)
        while True:
            try:
                self._do(self.gossiper.tick(self._now_s()))
            except Exception:
                logger.exception("gossip tick failed")
            await asyncio.sleep(TICK_S)

    async def _dial(self, action: Dial) -> None:
        peer = action.peer
        try:
            async with asyncio.timeout(action.timeout_s):
                addresses = [parse_address(text) for text in action.addresses]
                channel = await self._open(addresses, PURPOSE_GOSSIP)
        except TimeoutError:
            error: ShoalError = PeerTimeout(f"no answer within {action.timeout_s:g} s")
        except ShoalError as failure:
            error = failure
        else:
            self.failures.pop(peer, None)
            if self.gossiper.prefers_new(peer, is_dialled=True):
                await self._keep_in_touch(channel, is_dialled=True)
            else:
                channel.close()
                self.gossiper.kept(peer)
                self._progress.set()
            return
        logger.debug("not in touch peer=%s reason=%s", short(peer), error)
        self.failures[peer] = error
        if len(self.failures) > FAILURES_MAX:
            del self.failures[next(iter(self.failures))]
        lives = isinstance(error, PeerBusy | PeerRefused | VersionMismatch)
        tell = self.gossiper.turned_away if lives else self.gossiper.undialled
        self._do(tell(peer, self._now_s()))
        self._progress.set()

    async def _keep_in_touch(self, channel: Channel, *, is_dialled: bool) -> None:
        peer = channel.peer
        old = self._links.get(peer)
        if old is not None:
            old.part()
        link = self._links[peer] = GossipLink(channel)
        self._running.add(link)
        self._do(self.gossiper.joined(peer, self._now_s(), is_dialled=is_dialled))
        self._progress.set()
        try:
            await link.run(lambda message: self._hear(link, message))
        except (PeerMisbehaved, ProtocolError) as error:
            if self._links.get(peer) is link:
                del self._links[peer]
                logger.warning("neighbour shunned peer=%s reason=%s", short(peer), error)
                self._do(self.gossiper.shun(peer, self._now_s()))
            await channel.refuse(error)
        except (PeerUnreachable, PeerTimeout) as error:
            logger.debug("gossip stream ended peer=%s reason=%s", short(peer), error)
        finally:
            link.close()
            self._running.discard(link)
            if self._links.get(peer) is link:
                del self._links[peer]
                self._do(self.gossiper.left(peer, self._now_s()))
            for untaken in self._untaken.values():
                untaken.discard(peer)
            self._progress.set()

    def _hear(self, link: GossipLink, message: Message) -> None:
        if self._links.get(link.peer) is not link:
            return  # its place was taken, or it was dropped
        if isinstance(message, Error):
            del self._links[link.peer]
            self._do(self.gossiper.turned_away(link.peer, self._now_s()))
            raise PeerUnreachable(f"{message.code}: {message.detail}")
        if isinstance(message, Taken):
            self._untaken.get(message.call, set()).discard(link.peer)
            self._progress.set()
        self._do(self.gossiper.receive(link.peer, message, self._now_s()))
        if self.gossiper.accused:
            self.gossiper.accused = False
            self._suspected.set()

    def _do(self, actions: Iterable[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    link = self._links.get(action.peer)
                    if link is not None:
                        link.post(action.message)
                case Dial() if not self._tasks.is_closed:
                    self._tasks.spawn(self._dial(action), f"to {short(action.peer)}")
                case Drop():
                    link = self._links.pop(action.peer, None)
                    logger.debug("parting peer=%s reason=%s", short(action.peer), action.reason)
                    if link is not None and action.is_polite:
                        link.part()
                    elif link is not None:
                        link.close()

    async def _wait_for_neighbours(self) -> None:
        """Give dials that are due a chance to succeed."""
        if self._tasks.is_closed:
            return
        self._do(self.gossiper.seek(self._now_s()))
        try:
            async with asyncio.timeout(SETTLE_S):
                while self.gossiper.is_dialling:
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            logger.debug("dials under way after %g s", SETTLE_S)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()


def _by_peer(addresses: Iterable[Address], own: PeerId) -> dict[PeerId, tuple[Address, ...]]:
    """The joins, by peer, in the order given; without ourselves."""
    by_peer: dict[PeerId, tuple[Address, ...]] = {}
    for address in addresses:
        if address.peer != own:
            by_peer[address.peer] = (*by_peer.get(address.peer, ()), address)
    return by_peer
