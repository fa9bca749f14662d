"""A server and its directory: answering for it, and keeping its own record there.

`StoreBook` is the server's AddressBook over a record store. `Announcer` signs what the
server says about itself, again before it expires, and a tombstone at the end.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import Final, Protocol

from shoal.base.backend import BackendFacts
from shoal.base.errors import PeerBusy, ShoalError
from shoal.base.ids import PeerId, short
from shoal.base.limits import RECORD_TTL_S
from shoal.discovery.coordinates import to_wire
from shoal.discovery.exchange import Intake, answer_directory
from shoal.discovery.records import Adapter, MoveIntent, Record, RecordState, sign_record
from shoal.discovery.store import RecordStore
from shoal.net.address import Address, parse_address, parse_listen
from shoal.net.identity import Identity
from shoal.plan.coordinates import Coordinate
from shoal.plan.view import Intent
from shoal.wire.directory import GetRecords, Publish
from shoal.wire.messages import ControlMessage

logger = logging.getLogger(__name__)

REPUBLISH_AFTER_S: Final = 0.8 * RECORD_TTL_S
"""Two minutes before a record's end: neighbours that missed it get it within one of them,
and a thousand servers that renew more often would fill each other's lines."""

REFUTE_GAP_S: Final = 5.0
"""Between two records: others take one in 5 s from a peer, and drop the rest as a flood."""


class StoreBook:
    """The AddressBook of a server whose directory keeps its records in `store`."""

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._intake = Intake(store)

    def learn(self, record: bytes) -> None:
        """Take a signed record over if it is valid and news, and not one too many of late.

        Raises:
            ShoalError: it is not valid.
        """
        try:
            self._intake.accept(record, asyncio.get_running_loop().time())
        except PeerBusy as error:  # no reason to refuse a route: gossip brings it too
            logger.debug("record of a route not taken reason=%s", error)

    def addresses(self, peer: PeerId) -> tuple[Address, ...]:
        """Where a peer with a valid record of this swarm can be dialled."""
        self._store.expire(asyncio.get_running_loop().time())
        found = self._store.find(peer)
        if found is None:
            return ()
        return tuple(parse_address(text) for text in found.record.addresses)

    def answer(self, message: GetRecords | Publish) -> ControlMessage:
        """The answer to somebody else's question."""
        now_s = asyncio.get_running_loop().time()
        return answer_directory(self._store, message, now_s, self._intake)


class Publisher(Protocol):
    """What is needed of a directory."""

    async def publish(self, data: bytes) -> None:
        """Make a signed record of ours known."""

    async def suspected(self) -> None:
        """Return when a peer says that we have gone; maybe never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a server says about itself, besides its state."""

    swarm: str
    boot_ms: int
    """Unix time of the start; with a counter it orders this peer's records."""
    addresses: tuple[str, ...]
    facts: BackendFacts
    decode_s_per_block: float = 0.0
    """Measured; 0: not measured."""
    prefill_s_per_block_token: float = 0.0
    decode_s_by_batch: tuple[tuple[int, float], ...] = ()
    version: str = ""
    intent: Intent | None = None
    """Where it wants to move."""
    head: str = ""
    """Numerics class of the head that it runs for thin clients; empty: none."""
    coordinate: Coordinate | None = None
    """Where it is in the space of round trips; None: not known yet."""
    adapters: tuple[tuple[str, bytes], ...] = ()
    """(label, name) of the LoRA adapters that it serves to everybody."""
    sent_bytes_per_s: float = 0.0
    """The rate at which others take its bytes; 0: not known."""


class Announcer:
    """Keeps one server's record in a directory."""

    def __init__(
        self, identity: Identity, directory: Publisher, announcement: Announcement
    ) -> None:
        self._identity = identity
        self._directory = directory
        self._announcement = self._published = announcement
        self._state: RecordState = "joining"
        self._counter = 0

    @property
    def published(self) -> Announcement:
        """What our last record says."""
        return self._published

    @property
    def announcement(self) -> Announcement:
        """What is said now."""
        return self._announcement

    def restate(self, announcement: Announcement) -> None:
        """Say this from the next record on."""
        self._announcement = announcement

    async def announce(self, state: RecordState) -> None:
        """Publish a new record with this state.

        Raises:
            ConfigError: nobody would accept it, or this identity is in use elsewhere.
        """
        self._state, self._published = state, self._announcement
        self._counter += 1
        logger.info("announcing state=%s counter=%d", state, self._counter)
        await self._directory.publish(sign_record(self._identity, self._record()))

    async def repeat(self) -> None:
        """Publish a new record with the state that we are in.

        Raises:
            ConfigError: as `announce`.
        """
        await self.announce(self._state)

    async def want(self, intent: Intent | None) -> None:
        """Say where we want to move; None: we stay.

        Raises:
            ConfigError: as `announce`.
        """
        self._announcement = replace(self._announcement, intent=intent)
        await self.announce("online")

    async def moved(self, facts: BackendFacts) -> None:
        """Say that these blocks are served from now on.

        Raises:
            ConfigError: as `announce`.
        """
        self._announcement = replace(self._announcement, facts=facts, intent=None)
        await self.announce("online")

    async def keep(self) -> None:
        """Publish again before the record expires and when somebody believes that we have
        gone, until cancelled.

        Raises:
            ConfigError: this identity is in use elsewhere.
        """
        while True:
            try:
                async with asyncio.timeout(REPUBLISH_AFTER_S):
                    await self._directory.suspected()
                    logger.info("refuting that we have gone")
            except TimeoutError:
                logger.debug("renewing our record")
            await self.repeat()
            await asyncio.sleep(REFUTE_GAP_S)

    async def withdraw(self, timeout_s: float) -> None:
        """Publish a tombstone to whoever can be reached in time; once is enough.

        Others learn of it when the record expires, or by dialling us.
        """
        if self._state == "offline":
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self.announce("offline")
        except (TimeoutError, ShoalError) as error:
            logger.info("tombstone not delivered peer=%s reason=%r",
                        short(self._identity.peer), error)  # fmt: skip

    def _record(self) -> Record:
        said, facts = self._announcement, self._announcement.facts
        return Record(
            peer=self._identity.peer,
            swarm=said.swarm,
            boot_ms=said.boot_ms,
            counter=self._counter,
            ttl_s=RECORD_TTL_S,
            state=self._state,
            addresses=list(said.addresses),
            model=facts.model,
            num_blocks=facts.num_blocks,
            hidden_size=facts.hidden_size,
            start=facts.span.start,
            end=facts.span.end,
            numerics=facts.numerics,
            is_exact=facts.is_exact,
            encodings=list(facts.encodings),
            cache_tokens=facts.cache_tokens,
            decode_s_per_block=said.decode_s_per_block,
            prefill_s_per_block_token=said.prefill_s_per_block_token,
            version=said.version,
            session_tokens_max=facts.session_tokens_max,
            intent=_to_wire(said.intent),
            decode_s_by_batch=list(said.decode_s_by_batch),
            head=said.head,
            coordinate=to_wire(said.coordinate),
            adapters=[Adapter(label, name) for label, name in said.adapters],
            sent_bytes_per_s=said.sent_bytes_per_s,
        )


def _to_wire(intent: Intent | None) -> MoveIntent | None:
    if intent is None:
        return None
    span = intent.span
    return MoveIntent(
        ticket=intent.ticket, start=span.start, end=span.end, is_going=intent.is_going
    )


def public_address(listening: Address, announced: str | None) -> Address:
    """The address to announce: `announced` (tcp://HOST:PORT) if given, else our own.

    Port 0 stands for the port we listen on.

    Raises:
        ConfigError: malformed.
    """
    if announced is None:
        return listening
    where = parse_listen(announced)
    return Address(where.scheme, listening.peer, where.host, where.port or listening.port)
