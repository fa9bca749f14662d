"""What training clients may leave in a server's memory, and what they are told beyond it."""

import random
from dataclasses import replace

import pytest

from shoal.base.errors import MessageTooLarge, PeerBusy
from shoal.base.spans import Span
from shoal.client.training import TrainConfig, TrainingClient
from shoal.lab.toy_blocks import HIDDEN_SIZE, TOY_LAYER
from shoal.lab.training_runs import check_step, draw_batch
from shoal.net.channel import PURPOSE_TRAINING
from shoal.server.config import ServerConfig
from shoal.server.training_limits import TrainingLimits
from shoal.wire.messages import Error
from shoal.wire.training import (
    BlockShape,
    Chunk,
    Done,
    Forward,
    Micro,
    PutTensors,
    TargetShape,
    Training,
)
from tests.simulation.scene import scene, until

WHOLE = Span(0, 4)
ROW = 4 * HIDDEN_SIZE
RANK = 8
TENSOR_BYTES = 2 * 4 * RANK * HIDDEN_SIZE
"""A and B of one layer in float32."""


def with_tensors(rng, **config):
    batch = draw_batch(rng, WHOLE, 0)
    while batch.trained is None:
        batch = draw_batch(rng, WHOLE, 0)
    return batch


@scene("a 0:4")
async def test_tensors_travel_once_per_step_and_server(it):
    """The stream's first call, which dials it, too."""
    rng = random.Random(3)
    client = TrainingClient(it.client, TrainConfig(micro_tokens=1 << 10))
    await check_step(client, with_tensors(rng), rng)
    visitor = it["a"].server.training._visitors[it.client.me]
    assert visitor._last_call == 3  # tensors, out, and back
    await client.close()


SMALL = TrainingLimits(tensor_bytes_per_client=TENSOR_BYTES + TENSOR_BYTES // 2)


@scene("a 0:1", config=ServerConfig(training=SMALL), iteration_s=3.0)
async def test_tensors_that_open_calls_use_are_counted_though_they_were_replaced(it):
    channel = await it.client.dial(it["a"].peer, PURPOSE_TRAINING)

    async def answer():
        while isinstance((found := (await channel.receive())[0]), Training):
            pass
        return found

    async def put(call, name):
        shape = BlockShape(0, 0, [TargetShape(TOY_LAYER, HIDDEN_SIZE, HIDDEN_SIZE)])
        await channel.send(
            PutTensors(call, name * 16, "float32", RANK, 1.0, 0.0, False, [shape], TENSOR_BYTES)
        )
        await channel.send(Chunk(call, 0), bytes(TENSOR_BYTES))
        return await answer()

    def held_bytes():
        visitor = it["a"].server.training._visitors[it.client.me]
        return visitor.tensor_bytes

    assert await put(1, b"a") == Done(1, 0, 0)
    await channel.send(Forward(2, 2, Micro(0, 1, [2], "float32", b"a" * 16), True, 2 * ROW))
    await channel.send(Chunk(2, 0), bytes(2 * ROW))
    await until(lambda: not it["a"].server.training._visitors[it.client.me]._uploads)
    refused = await put(3, b"b")
    assert isinstance(refused, Error)
    assert (refused.call, refused.code) == (3, PeerBusy.code)
    assert "open calls" in refused.detail
    assert held_bytes() == TENSOR_BYTES
    assert await answer() == Done(2, 2 * ROW, 0)
    await channel.receive()
    assert await put(4, b"b") == Done(4, 0, 0)
    assert held_bytes() == TENSOR_BYTES
    assert not it["a"].server.training.kept.held_bytes()  # kept passes went with their tensors
    channel.close()


@scene("a 0:4", config=ServerConfig(training=TrainingLimits(rows_per_pass_max=8)))
async def test_who_sends_too_many_rows_is_told_what_helps_on_both_sides(it):
    rng = random.Random(5)
    batch = replace(draw_batch(rng, WHOLE, 0), lengths=(9,), rows=bytes(9 * ROW), trained=None)
    client = TrainingClient(it.client, TrainConfig())
    with pytest.raises(MessageTooLarge, match=r"--training-rows.*micro_tokens.*--max-length"):
        await client.forward(batch, is_kept=False)
    await client.close()
