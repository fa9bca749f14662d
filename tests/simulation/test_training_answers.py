"""Answers of training that nobody takes: counted when calls come, and given up in the end."""

import asyncio

import pytest

from shoal.base.errors import PeerBusy
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.net.channel import PURPOSE_TRAINING
from shoal.server import training, training_stream
from shoal.server.config import ServerConfig
from shoal.server.training_limits import TrainingLimits
from shoal.server.training_stream import SEND_TIMEOUT_S
from shoal.wire.messages import Error
from shoal.wire.training import Chunk, Done, Forget, Forward, Micro
from tests.simulation.scene import scene, until

ROW = 4 * HIDDEN_SIZE
ROWS = 64


def forward(call, rows=ROWS):
    micro = Micro(0, 1, [rows], "float32")
    return Forward(call, call, micro, False, rows * ROW)


SMALL = TrainingLimits(
    answer_bytes_per_client=2 * ROWS * ROW, answer_bytes_max=3 * ROWS * ROW
)  # fmt: skip


@scene("a 0:1", config=ServerConfig(training=SMALL))
async def test_answers_to_come_are_counted_when_calls_are_announced(it):
    other = await it.open_client()
    mine, theirs = [
        await one.dial(it["a"].peer, PURPOSE_TRAINING) for one in (it.client, other)
    ]  # fmt: skip
    for call in (1, 2, 3):
        await mine.send(forward(call))
    answer, _ = await mine.receive()
    assert (answer.call, answer.code) == (3, PeerBusy.code)  # two are what a client may have
    await theirs.send(forward(1))
    await theirs.send(forward(2))
    answer, _ = await theirs.receive()
    assert (answer.call, answer.code) == (2, PeerBusy.code)  # three are what all may have
    for call in (1, 2):
        await mine.send(Chunk(call, 0), bytes(ROWS * ROW))
    done = [await mine.receive() for _ in range(4)]
    assert [type(message) for message, _ in done] == [Done, Chunk] * 2
    # What was taken makes room; one alone may be larger than all of it.
    await mine.send(forward(4, 1))
    await mine.send(Chunk(4, 0), bytes(ROW))
    answer, _ = await mine.receive()
    assert answer == Done(4, ROW, 0)
    theirs.close()
    await until(lambda: it["a"].server.training.num_clients == 1)
    await mine.receive()
    await mine.send(forward(5, 4 * ROWS))
    await mine.send(Chunk(5, 0), bytes(4 * ROWS * ROW))
    answer, _ = await mine.receive()
    assert not isinstance(answer, Error)
    mine.close()


@scene("a 0:1", config=ServerConfig(training=TrainingLimits(rows_per_pass_max=1 << 15)))
async def test_who_takes_answers_in_a_trickle_is_left(it):
    channel = await it.client.dial(it["a"].peer, PURPOSE_TRAINING)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_stream, "ANSWER_S_MAX", 10.0)
        rows = 1 << 15
        await channel.send(forward(1, rows))
        for at in range(0, rows * ROW, 1 << 17):
            await channel.send(Chunk(1, at), bytes(1 << 17))
        while not isinstance((await channel.receive())[0], Done):
            pass
        # Each chunk is taken in time, but not all of them.
        taking = asyncio.ensure_future(_trickle(channel, 0.4 * SEND_TIMEOUT_S))
        await until(lambda: it["a"].server.training.num_clients == 0, within_s=100.0)
        taking.cancel()
        channel.close()
        await asyncio.gather(taking, return_exceptions=True)


async def _trickle(channel, pause_s):
    while True:
        await asyncio.sleep(pause_s)
        await channel.receive()


@scene("a 0:1")
async def test_who_only_keeps_a_place_gives_it_to_a_newcomer(it):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "CLIENTS_MAX", 1)
        other = await it.open_client()
        holder = await it.client.dial(it["a"].peer, PURPOSE_TRAINING)
        await holder.send(Forget([]))
        await until(lambda: it["a"].server.training.num_clients == 1)
        early = await other.dial(it["a"].peer, PURPOSE_TRAINING)
        answer, _ = await early.receive()
        assert answer.code == PeerBusy.code
        for _ in range(4):
            await asyncio.sleep(0.3 * training.IDLE_PLACE_S)
            await holder.send(Forget([]))
        late = await other.dial(it["a"].peer, PURPOSE_TRAINING)
        await late.send(forward(1, 1))
        await late.send(Chunk(1, 0), bytes(ROW))
        answer, _ = await late.receive()
        assert answer == Done(1, ROW, 0)
        holder.close()
        late.close()
