"""Asking for records and answering: pages, later records, and bad ones."""

from __future__ import annotations

from collections import deque

import pytest

from shoal.base.errors import PeerBusy, PeerMisbehaved, ProtocolError
from shoal.base.ids import PeerId
from shoal.base.limits import HEADER_BYTES_MAX, RECORD_TTL_S
from shoal.discovery.allowance import UPDATES_BURST
from shoal.discovery.exchange import (
    PUBLISH_RECORDS_MAX,
    Intake,
    answer_directory,
    fetch_from,
    publish_to,
)
from shoal.discovery.store import RecordStore
from shoal.lab.clock import run_virtual
from shoal.wire.directory import GetRecords, Publish, Records
from shoal.wire.messages import (
    Alive,
    Error,
    Message,
    Ping,
    decode,
    encode,
)
from tests.unit.discovery_cases import SWARM, identity, signed

PEERS = sorted((identity(number) for number in range(1, 8)), key=lambda who: who.peer)
ALICE, BOB = PEERS[:2]


def store_of(*records: bytes) -> RecordStore:
    store = RecordStore(SWARM)
    for data in records:
        store.accept(data, 0.0)
    return store


class Script:
    """A channel to a peer that says what it is told to say."""

    peer = PeerId(BOB.peer)

    def __init__(self, *answers: Message) -> None:
        self.answers = deque(answers)
        self.asked: list[Message] = []

    async def send(self, message: Message) -> None:
        self.asked.append(message)

    async def receive(self) -> tuple[Message, memoryview]:
        return self.answers.popleft(), memoryview(b"")


class Answering(Script):
    """A channel to a peer that answers from a store; everything goes through bytes."""

    def __init__(self, store: RecordStore) -> None:
        super().__init__()
        self.store = store

    async def send(self, message: Message) -> None:
        question = decode(encode(message))
        assert isinstance(question, GetRecords | Publish)
        self.asked.append(question)
        answer = encode(answer_directory(self.store, question, 1.0))
        assert len(answer) <= HEADER_BYTES_MAX
        self.answers.append(decode(answer))


def test_everything_is_handed_on_tombstones_too() -> None:
    data = [signed(ALICE), signed(BOB, 1, state="offline", addresses=[])]
    mine = RecordStore(SWARM)
    run_virtual(fetch_from(Answering(store_of(*data)), mine, 1.0))
    assert [found for _, found in mine.envelopes()] == data


def test_what_expired_is_not_handed_on() -> None:
    answer = answer_directory(store_of(signed(ALICE)), GetRecords(3), RECORD_TTL_S)
    assert answer == Records(3, [])


def test_large_answers_come_in_pages_that_fit() -> None:
    big = ["e" * 256] * 32
    crowd = [identity(number) for number in range(100, 180)]
    theirs = store_of(*(signed(who, encodings=big) for who in crowd))
    mine = RecordStore(SWARM)
    channel = Answering(theirs)
    run_virtual(fetch_from(channel, mine, 1.0))
    assert len(mine.snapshot().records) == len(crowd)
    assert len(channel.asked) > 2


def test_publishing_teaches_the_peer_and_the_publisher() -> None:
    theirs = store_of(signed(ALICE, 5))
    mine = RecordStore(SWARM)
    run_virtual(publish_to(Answering(theirs), signed(BOB, 1), mine, 1.0))
    assert theirs.sequence(BOB.peer) == (1_000, 1)
    run_virtual(publish_to(Answering(theirs), signed(BOB, 1), mine, 1.0))
    assert mine.find(BOB.peer) is None, "the same record is no news"
    run_virtual(publish_to(Answering(theirs), signed(ALICE, 4), mine, 1.0))
    assert mine.sequence(ALICE.peer) == (1_000, 5), "our own is older than what is known"


def test_an_old_record_of_an_expired_peer_is_answered_with_nothing() -> None:
    store = store_of(signed(ALICE))
    store.expire(RECORD_TTL_S)
    assert answer_directory(store, Publish(1, [signed(ALICE)]), RECORD_TTL_S) == Records(1, [])


def test_a_bad_record_is_answered_with_why_and_the_good_ones_are_kept() -> None:
    store = RecordStore(SWARM)
    answer = answer_directory(store, Publish(7, [signed(ALICE), b"bad", signed(BOB)]), 0.0)
    assert isinstance(answer, Error)
    assert (answer.call, answer.code) == (7, "protocol")
    assert [who for who, _ in store.envelopes()] == [ALICE.peer]


def test_one_message_can_not_keep_us_busy() -> None:
    store = RecordStore(SWARM)
    crowd = [signed(identity(number)) for number in range(100, 101 + PUBLISH_RECORDS_MAX)]
    answer_directory(store, Publish(1, crowd), 0.0)
    assert len(store.snapshot().records) == PUBLISH_RECORDS_MAX


def test_bad_records_in_an_answer_are_left_out_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mine = RecordStore(SWARM)
    other = signed(PEERS[2], swarm="elsewhere")
    channel = Script(Records(0, [b"garbage", signed(ALICE)[:-1], other, signed(BOB)]))
    run_virtual(fetch_from(channel, mine, 1.0))
    assert [who for who, _ in mine.envelopes()] == [BOB.peer]
    assert caplog.text.count("record refused") == 3


def test_answers_to_other_questions_are_skipped() -> None:
    mine = RecordStore(SWARM)
    noise: list[Message] = [
        Alive(0, 0, 0.0, 0.0, 0.0),
        Ping(0),
        Error(9, "busy"),
        Records(9, [signed(ALICE)]),
    ]
    run_virtual(fetch_from(Script(*noise, Records(0, [signed(BOB)])), mine, 1.0))
    assert [who for who, _ in mine.envelopes()] == [BOB.peer]


def test_an_error_is_raised_as_what_it_is() -> None:
    with pytest.raises(PeerBusy, match="full") as caught:
        run_virtual(publish_to(Script(Error(0, "busy", "full", 3.0)), b"", RecordStore(SWARM), 0.0))
    assert caught.value.retry_after_s == 3.0
    with pytest.raises(ProtocolError):
        run_virtual(fetch_from(Script(Error(0, "protocol")), RecordStore(SWARM), 0.0))


@pytest.mark.parametrize("page", [[], [signed(ALICE)]], ids=["empty", "the same"])
def test_a_peer_that_never_ends_is_left(page: list[bytes]) -> None:
    answers = [Records(call, page, has_more=True) for call in range(5)]
    with pytest.raises(PeerMisbehaved, match="again"):
        run_virtual(fetch_from(Script(*answers), RecordStore(SWARM), 0.0))


def test_pages_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.discovery.exchange.PAGES_MAX", 2)
    answers = [Records(call, [signed(PEERS[call])], has_more=True) for call in range(3)]
    with pytest.raises(PeerMisbehaved, match="without end"):
        run_virtual(fetch_from(Script(*answers), RecordStore(SWARM), 0.0))


def test_a_flood_of_published_records_is_bounded() -> None:
    store = RecordStore(SWARM)
    intake = Intake(store)
    answers = [
        answer_directory(store, Publish(1, [signed(ALICE, counter)]), 0.0, intake)
        for counter in range(2 * UPDATES_BURST)
    ]
    busy = [answer for answer in answers if isinstance(answer, Error)]
    assert [answer.code for answer in busy] == ["busy"] * UPDATES_BURST
    assert answer_directory(store, Publish(1, [signed(ALICE, 99)]), 5.0, intake) == Records(1, [])
    for _ in range(100):
        intake.accept(signed(ALICE, 99), 5.0)
    assert intake.accept(signed(BOB, 1), 5.0), "what is known costs nothing"


def test_old_records_use_no_allowance_up() -> None:
    """A client whose view is behind sends the same old record with every route."""
    intake = Intake(RecordStore(SWARM))
    assert intake.accept(signed(ALICE, 2), 0.0)
    for _ in range(2 * UPDATES_BURST):
        assert not intake.accept(signed(ALICE, 1), 0.0)
    assert intake.accept(signed(ALICE, 3), 0.0)
