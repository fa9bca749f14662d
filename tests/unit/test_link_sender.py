"""The sending side of a stream: frames within their limits, answers, turns."""

import asyncio

import pytest

from shoal.base.errors import PeerBusy, PeerTimeout, PeerUnreachable, ProtocolError
from shoal.base.ids import PeerId, SessionId
from shoal.base.limits import ALIVE_PERIOD_S, CUTS_MAX, HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX
from shoal.lab.clock import run_virtual
from shoal.link.hearing import QUESTION, SILENT_S
from shoal.link.log import Log, LogEntry
from shoal.link.outbound import Outbound
from shoal.link.sender import RowSender
from shoal.wire.frames import encode_frame
from shoal.wire.messages import (
    WANT_ALL,
    Alive,
    Error,
    Have,
    Open,
    Rows,
    Stale,
    encode,
    split_rows,
)

PEER = PeerId(b"p" * 32)
WINDOW = 1 << 40


class Events:
    def __init__(self):
        self.earlier = []

    def on_cursor_moved(self, outbound):
        pass

    def on_needs_earlier(self, outbound):
        self.earlier.append(outbound)


class Wire:
    """A channel to a receiver that holds nothing and says so; it checks every frame."""

    def __init__(self, *, is_silent=False, is_deaf=False):
        """A deaf one says what it has, unasked, and hears nothing of rows and questions."""
        self.peer = PEER
        self.opened, self.frames, self.questions = [], [], 0
        self._is_deaf = is_deaf
        self.is_closed = False
        self._is_silent = is_silent
        self._answers = asyncio.Queue()

    async def send(self, message, *payload):
        encode_frame(encode(message), payload)  # raises over the limits
        if message == QUESTION:
            self.questions += 1
            if not (self._is_silent or self._is_deaf):
                self.answer(Stale(message.session, 0, 0))
        elif isinstance(message, Open):
            self.opened.append(message)
            if not self._is_silent:
                self.answer(Have(message.session, message.border, message.epoch, 0, 0, WINDOW))
        else:
            self.frames.append((message, b"".join(payload)))
        await asyncio.sleep(0)

    def answer(self, message):
        self._answers.put_nowait((message, b""))

    async def receive(self):
        return await self._answers.get()

    def close(self):
        self.is_closed = True

    @property
    def entries(self):
        return [pair for rows, payload in self.frames for pair in split_rows(rows, payload)]


def make_entry(position, count, data):
    return LogEntry(
        position=position, count=count, call_count=count, want=WANT_ALL, encoding="float32",
        num_rows=count, payload=data, payload_bytes=len(data),
    )  # fmt: skip


def outbound_with(number, *entries):
    log = Log()
    for count, data in entries:
        log.append(make_entry(log.end, count, data))
    outbound = Outbound(SessionId(number.to_bytes(16, "big")), 4, log)
    outbound.reroute(PEER, 1)
    return outbound


async def run_for(wire, outbounds, seconds=1.0):
    """Serve the stream for so long; raises what ends it earlier."""
    sender = RowSender(PEER, Events())
    for outbound in outbounds:
        sender.attach(outbound)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(seconds):
            await sender.run(wire)
    assert wire.is_closed
    return sender


def test_entries_that_are_legal_alone_may_not_fit_one_frame():
    """The small one goes first: the large one must wait for the next frame."""

    async def story():
        wire = Wire()
        small, large = b"s" * 16_384, bytes(PAYLOAD_BYTES_MAX)
        await run_for(wire, [outbound_with(1, (1, small)), outbound_with(2, (4096, large))])
        assert [len(payload) for _, payload in wire.frames] == [len(small), len(large)]

    run_virtual(story)


def with_many_cuts(number):
    """A receiver at revision 0 must be told of many truncations."""
    outbound = outbound_with(number, (70, bytes(280)))
    for rev in range(1, CUTS_MAX + 2):
        big = (1 << 40) + rev
        outbound.log.cut(big, [(big, rev)])
        outbound.log.append(make_entry(rev, 1, bytes(4)))
    return outbound


def test_many_cuts_may_not_fit_one_header():
    async def story():
        wire = Wire()
        await run_for(wire, [with_many_cuts(number) for number in range(300)])
        assert len({entry.session for entry, _ in wire.entries}) == 300
        assert len(wire.frames) > 1
        sizes = [len(encode(rows)) for rows, _ in wire.frames]
        assert HEADER_BYTES_MAX / 4 < max(sizes) <= HEADER_BYTES_MAX

    run_virtual(story)


def test_sessions_take_turns():
    """A long log does not hold up a short one, and all that is ready shares a frame."""

    async def story():
        wire = Wire()
        long = outbound_with(1, *[(1, bytes([i])) for i in range(50)])
        short = outbound_with(2, (1, b"x"))
        await run_for(wire, [long, short])
        rows = b"".join(bytes(part) for entry, part in wire.entries if entry.session[-1] == 1)
        assert rows == bytes(range(50))
        order = [entry.session[-1] for entry, _ in wire.entries]
        assert order.index(2) <= 1
        assert len(wire.frames) < 5

    run_virtual(story)


def test_every_session_is_asked_again_on_a_new_stream():
    async def story():
        outbounds = [outbound_with(number, (1, b"x")) for number in (1, 2)]
        sender = await run_for(Wire(), outbounds)
        assert not any(outbound.is_open for outbound in outbounds)
        wire = Wire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await sender.run(wire)
        assert {opened.session[-1] for opened in wire.opened} == {1, 2}
        assert len(wire.entries) == 2

    run_virtual(story)


def test_a_detached_session_is_not_sent():
    async def story():
        sender = RowSender(PEER, Events())
        gone, kept = outbound_with(1, (1, b"x")), outbound_with(2, (1, b"x"))
        for outbound in (gone, kept):
            sender.attach(outbound)
        sender.detach(gone)
        sender.wake(gone)
        wire = Wire()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await sender.run(wire)
        assert [entry.session[-1] for entry, _ in wire.entries] == [2]
        assert sender.outbounds == [kept]

    run_virtual(story)


def test_a_receiver_that_does_not_answer_is_given_up():
    async def story():
        sender = RowSender(PEER, Events())
        sender.attach(outbound_with(1, (1, b"x")))
        with pytest.raises(PeerTimeout):
            await sender.run(Wire(is_silent=True))
        assert asyncio.get_running_loop().time() == pytest.approx(SILENT_S)
        assert not sender.is_connected

    run_virtual(story)


def test_what_comes_unasked_is_no_sign_that_we_are_heard():
    """A path may swallow one direction only."""

    async def story():
        wire = Wire(is_deaf=True)
        sender = RowSender(PEER, Events())
        sender.attach(outbound_with(1, (1, b"x")))
        running = asyncio.ensure_future(sender.run(wire))
        while not running.done():
            await asyncio.sleep(0.1)
            wire.answer(Have(bytes(15) + b"\1", 4, 1, 0, 0, WINDOW))
        with pytest.raises(PeerTimeout):
            await running
        assert wire.questions >= 2
        assert asyncio.get_running_loop().time() <= SILENT_S + 0.2

    run_virtual(story)


def test_a_receiver_that_computes_long_is_waited_for():
    """It answers questions, ever fewer; with nothing under way there are none."""

    async def story():
        wire = Wire()
        await run_for(wire, [outbound_with(1, (1, b"x"))], seconds=60.0)
        assert 5 <= wire.questions <= 9
        idle = Wire()
        await run_for(idle, [outbound_with(1)], seconds=60.0)
        assert idle.questions == 0

    run_virtual(story)


def test_a_stream_without_sessions_is_kept_for_a_while():
    async def story():
        sender = RowSender(PEER, Events())
        with pytest.raises(PeerUnreachable, match="no session"):
            await sender.run(Wire(), idle_s=30.0)
        assert 30.0 <= asyncio.get_running_loop().time() <= 30.0 + 2 * ALIVE_PERIOD_S

    run_virtual(story)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (Error(0, "busy", "later", 2.0), PeerBusy),
        (Alive(0, 0, 0.0, 0.0, 0.0), ProtocolError),
        (Rows([]), ProtocolError),
    ],
    ids=["refused", "alive", "rows"],
)
def test_what_is_no_answer_ends_the_stream(message, error):
    async def story():
        wire = Wire()
        wire.answer(message)
        with pytest.raises(error):
            await RowSender(PEER, Events()).run(wire)

    run_virtual(story)


def test_the_owner_hears_that_earlier_rows_are_needed():
    async def story():
        outbound = outbound_with(1, (2, b"ab"), (2, b"cd"))
        outbound.log.trim(2)
        events = Events()
        sender = RowSender(PEER, events)
        sender.attach(outbound)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await sender.run(Wire())
        assert events.earlier == [outbound]

    run_virtual(story)
