"""How two peers exchange records: the questions, and the answers to them.

Everything here is about one control channel. Whom to ask, and when, is decided in
`gossip.py`.
"""

from __future__ import annotations

import logging
from typing import Final, Protocol

from shoal.base.errors import (
    PeerBusy,
    PeerMisbehaved,
    PeerRefused,
    ProtocolError,
    ShoalError,
    error_from_code,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import HEADER_BYTES_MAX
from shoal.discovery.allowance import (
    RECORDS_BURST,
    RECORDS_PER_S,
    UPDATES_PER_S,
    Allowance,
    UpdateLimits,
)
from shoal.discovery.records import claimed_peer, claimed_sequence
from shoal.discovery.store import RecordStore
from shoal.net.channel import error_message
from shoal.wire.directory import GetRecords, Publish, Records
from shoal.wire.messages import Error, Message

logger = logging.getLogger(__name__)

PAGE_BYTES_MAX: Final = HEADER_BYTES_MAX * 3 // 4
"""Records in one message: they must fit into a frame's header."""

RECORD_OVERHEAD_BYTES: Final = 14
"""Beside a record's own bytes: msgpack's prefix of a byte string, and its age."""

PUBLISH_RECORDS_MAX: Final = 64
"""Records of one Publish that are looked at: checking one takes about 0.1 ms."""

PAGES_MAX: Final = 1024
"""Pages of one answer that are read: more than RECORDS_MAX records of the largest size."""


class Asking(Protocol):
    """What is needed of a control channel."""

    @property
    def peer(self) -> PeerId:
        """Who is asked."""

    async def send(self, message: Message) -> None:
        """Send one message."""

    async def receive(self) -> tuple[Message, memoryview]:
        """The next message."""


class Intake:
    """What strangers may put into a store besides gossip: records published or in routes.

    One allowance for all of them together, and one for each peer's updates.
    """

    def __init__(self, store: RecordStore) -> None:
        self._store = store
        self._records: Allowance | None = None
        self._updates = UpdateLimits()

    def accept(self, data: bytes, now_s: float) -> bool:
        """Take a record; whether it was news.

        Raises:
            PeerBusy: too many new ones lately, or the store is full.
            ProtocolError, PeerMisbehaved, PeerRefused: not a valid record of this swarm.
        """
        if self._records is None:
            self._records = Allowance(RECORDS_BURST, RECORDS_PER_S, now_s)
        peer = claimed_peer(data)
        known = self._store.sequence(peer)
        if known is not None and claimed_sequence(data) <= known:
            return False  # no news, whoever signed it: that must not use the allowance up
        self._updates.forget(now_s)
        if not self._records.take(now_s) or not self._updates.take(peer, now_s):
            raise PeerBusy("too many new records", retry_after_s=1 / UPDATES_PER_S)
        return self._store.accept(data, now_s)


def answer_directory(
    store: RecordStore,
    message: GetRecords | Publish,
    now_s: float,
    intake: Intake | None = None,
) -> Records | Error:
    """What to answer a peer that asks for records or hands over its own.

    Both are answered by Records: to GetRecords with a page of them, to Publish with
    those that are later than what the sender gave. A publisher that hands over a bad record
    gets the Error; good ones before it are kept. `intake` bounds what is handed over.
    """
    store.expire(now_s)
    if isinstance(message, GetRecords):
        return _page(store, message, now_s)
    return _take(store, message, now_s, intake or Intake(store))


def _page(store: RecordStore, message: GetRecords, now_s: float) -> Records:
    page: list[bytes] = []
    ages_s: list[float] = []
    room = PAGE_BYTES_MAX
    for peer, data in store.envelopes(message.after):
        room -= len(data) + RECORD_OVERHEAD_BYTES
        if room < 0:
            return Records(message.call, page, True, ages_s)
        page.append(data)
        ages_s.append(store.age_s(peer, now_s))
    return Records(message.call, page, False, ages_s)


def _take(store: RecordStore, message: Publish, now_s: float, intake: Intake) -> Records | Error:
    later: list[bytes] = []
    for data in message.records[:PUBLISH_RECORDS_MAX]:
        try:
            if intake.accept(data, now_s):
                continue
            held = store.find(claimed_peer(data))
        except ShoalError as error:
            return error_message(error, message.call)
        if held is not None and held.data != data:
            later.append(held.data)
    return Records(message.call, later)


async def publish_to(channel: Asking, data: bytes, store: RecordStore, now_s: float) -> None:
    """Hand our record over; what the peer knows better goes into `store`.

    Raises:
        PeerError, ProtocolError: it went wrong, or the peer does not take it.
    """
    answer = await _ask(channel, Publish(0, [data]))
    _keep(answer, store, now_s, channel.peer)


async def fetch_from(channel: Asking, store: RecordStore, now_s: float) -> None:
    """Take everything that the peer knows into `store`, page by page.

    Raises:
        PeerError, ProtocolError: it went wrong; the pages before are kept.
    """
    after = b""
    for call in range(PAGES_MAX):
        answer = await _ask(channel, GetRecords(call, after))
        last = _keep(answer, store, now_s, channel.peer)
        if not answer.has_more:
            return
        if last is None or last <= after:
            raise PeerMisbehaved(f"{short(channel.peer)} gives the same records again and again")
        after = last
    raise PeerMisbehaved(f"{short(channel.peer)} gives records without end")


async def _ask(channel: Asking, question: GetRecords | Publish) -> Records:
    await channel.send(question)
    while True:
        answer, _ = await channel.receive()
        if isinstance(answer, Error) and answer.call in (0, question.call):
            raise error_from_code(
                answer.code, f"{short(channel.peer)}: {answer.detail}", answer.retry_after_s
            )
        if isinstance(answer, Records) and answer.call == question.call:
            return answer


def _keep(answer: Records, store: RecordStore, now_s: float, source: PeerId) -> PeerId | None:
    """Take the records that are good, and log who handed on bad ones; the last peer's id."""
    last: PeerId | None = None
    for index, data in enumerate(answer.records):
        age_s = answer.ages_s[index] if index < len(answer.ages_s) else 0.0
        try:
            last = claimed_peer(data)
            store.accept(data, now_s, age_s)
        except (ProtocolError, PeerMisbehaved, PeerRefused, PeerBusy) as error:
            logger.warning("record refused source=%s reason=%s", short(source), error)
    return last
