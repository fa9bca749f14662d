"""The receiving side of a stream: when answers leave."""

import asyncio
from contextlib import suppress

from shoal.base.ids import PeerId, SessionId
from shoal.lab.clock import run_virtual
from shoal.link.receiver import ACK_DELAY_S, RowReceiver
from shoal.wire.messages import Ack, Gap, Have

PEER = PeerId(b"p" * 32)
SESSION, OTHER = SessionId(b"s" * 16), SessionId(b"o" * 16)


class Wire:
    """A channel on which nothing comes."""

    def __init__(self):
        self.peer, self.sent = PEER, []
        self._loop = asyncio.get_running_loop()

    async def send(self, message, *payload):
        self.sent.append((self._loop.time(), message))

    async def receive(self):
        await asyncio.Event().wait()

    def close(self):
        pass


def answers_of(posts):
    """(seconds, answer) of what was sent after these (seconds, answer) were posted."""

    async def run():
        wire = Wire()
        receiver = RowReceiver(wire, events=None)
        task = asyncio.create_task(receiver.run())
        began_s = asyncio.get_running_loop().time()
        for at_s, answer in posts:
            await asyncio.sleep(began_s + at_s - asyncio.get_running_loop().time())
            receiver.post(answer)
        await asyncio.sleep(1.0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return [(round(at_s - began_s, 6), answer) for at_s, answer in wire.sent]

    return run_virtual(run)


def test_acknowledgements_wait_for_later_ones() -> None:
    acks = [(0.001 * n, Ack(SESSION, 4, 1, 0, n)) for n in range(5)]
    assert answers_of(acks) == [(ACK_DELAY_S, Ack(SESSION, 4, 1, 0, 4))]


def test_the_next_one_waits_anew() -> None:
    posts = [(0.0, Ack(SESSION, 4, 1, 0, 1)), (0.1, Ack(SESSION, 4, 1, 0, 2))]
    assert [at_s for at_s, _ in answers_of(posts)] == [ACK_DELAY_S, round(0.1 + ACK_DELAY_S, 6)]


def test_other_answers_leave_at_once_and_take_them_along() -> None:
    ack, gap = Ack(SESSION, 4, 1, 0, 1), Gap(OTHER, 4, 1, 0, 0)
    assert answers_of([(0.0, ack), (0.01, gap)]) == [(0.01, ack), (0.01, gap)]
    have = Have(OTHER, 4, 1, 0, 0, 1 << 20)
    assert answers_of([(0.0, have)]) == [(0.0, have)]
