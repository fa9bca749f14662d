"""Training in a simulated swarm: right gradients whoever fails, and decode rows that go first."""

import asyncio
import itertools
import random
from contextlib import suppress
from dataclasses import replace

import pytest

from shoal.base.adapters import DropoutKey
from shoal.base.errors import (
    AdapterBad,
    BadInput,
    MessageTooLarge,
    NoRouteError,
    PeerBusy,
    PeerRefused,
    PeerUnreachable,
    ProtocolError,
)
from shoal.base.spans import Span
from shoal.client.training import TrainConfig, TrainingClient
from shoal.lab.chaos import draw_plan
from shoal.lab.toy_blocks import HIDDEN_SIZE, finite_row
from shoal.lab.training_runs import check_step, check_whole_step, draw_batch, run_training
from shoal.net.channel import PURPOSE_TRAINING
from shoal.server.config import ServerConfig
from shoal.server.quotas import Quotas
from shoal.server.training_limits import TrainingLimits
from shoal.wire.messages import Error
from shoal.wire.tensors import row_bytes
from shoal.wire.training import Backward, Chunk, Done, Forget, Forward, Micro, PutTensors
from tests.simulation.scene import now_s, scene, until

WHOLE = Span(0, 4)


def training(it, **config):
    return TrainingClient(it.client, TrainConfig(**config))


def steps_at(it, name):
    """Steps that a server ran."""
    return len(it[name].backend.training.steps)


@scene("a 0:2, b 2:4")
async def test_a_batch_is_cut_and_comes_back_right(it):
    rng = random.Random(1)
    client = training(it, micro_tokens=6)
    for step in range(4):
        trail = await check_step(client, draw_batch(rng, WHOLE, step), rng)
        for stages in trail.stages:
            assert it.names(stage.peer for stage in stages) == ["a", "b"]
    trail = await check_step(client, draw_batch(rng, Span(1, 3), 9), rng)
    assert client.repairs == 0
    await client.close()


@scene("a 0:2, b 2:4, c 0:4")
async def test_micro_batches_turn_round_as_soon_as_they_can(it):
    rng = random.Random(31)
    client = training(it, micro_tokens=6, lanes_max=1)
    for number in range(6):
        await check_whole_step(client, draw_batch(rng, WHOLE, number), rng)
    assert client.repairs == 0
    batch = replace(draw_batch(rng, WHOLE, 9), lengths=(6,) * 20, trained=None)
    batch = replace(batch, rows=finite_row(b"r", 120 * row_bytes("float32", HIDDEN_SIZE)))
    kept = []

    async def ending(chosen, output):
        kept.append(sum(len(it[name].server.training.kept) for name in "abc"))
        return output

    await client.step(batch, ending, lambda *_: None)
    # As many micro-batches are on their way as keep the servers busy, at each of at most two.
    assert len(kept) == 20
    assert max(kept) <= 8
    out = await client.step(batch, ending, None)
    assert (out, kept[20:]) == (b"", [0] * 20)
    await client.close()


@scene("a 0:4")
async def test_what_fails_at_the_end_of_a_chain_ends_the_step(it):
    rng = random.Random(32)
    client = training(it, micro_tokens=6)
    batch = draw_batch(rng, WHOLE, 0)

    async def fails(_chosen, _output):
        raise BadInput("no label counts")

    async def gives(chosen, output):
        return output[:-4] if chosen.start else b"\xff" * len(output)

    for ending, why in ((fails, "no label"), (gives, "not finite|bytes")):
        with pytest.raises(BadInput, match=why):
            await client.step(batch, ending, lambda *_: None)
    await until(lambda: not len(it["a"].server.training.kept))
    await check_whole_step(client, batch, rng)
    await client.close()


@scene("a 0:4, b 0:4, c 0:2, d 2:4")
async def test_chains_work_side_by_side(it):
    rng = random.Random(2)
    client = training(it, micro_tokens=3)
    batch = replace(draw_batch(rng, WHOLE, 0), lengths=(2,) * 12)
    batch = replace(batch, rows=batch.rows[:0] + bytes(12 * 2 * 4 * HIDDEN_SIZE), trained=None)
    trail = await check_step(client, batch, rng)
    used = {it.name(stage.peer) for stages in trail.stages for stage in stages}
    assert used == {"a", "b", "c", "d"}
    await client.close()


@scene("a 0:2, b 2:4, spare-b 2:4", iteration_s=0.05)
async def test_who_dies_on_the_way_out_is_replaced_and_only_its_blocks_run_again(it):
    rng = random.Random(3)
    client = training(it, micro_tokens=1000, lanes_max=1)
    batch = draw_batch(rng, WHOLE, 0)
    working = asyncio.ensure_future(client.forward(batch, is_kept=True))
    await until(lambda: steps_at(it, "b") or steps_at(it, "spare-b"))
    victim = "b" if steps_at(it, "b") else "spare-b"
    before = steps_at(it, "a")
    await it[victim].crash()
    trail = await working
    assert steps_at(it, "a") == before == 2
    assert client.repairs == 1
    assert trail.stages[0][1].peer != it[victim].peer
    await client.close()


@scene("a 0:2, b 2:4, spare-b 2:3, spare-c 3:4", iteration_s=0.05)
async def test_who_dies_on_the_way_back_is_replaced_by_two(it):
    rng = random.Random(4)
    client = training(it, micro_tokens=1000, lanes_max=1)
    crash = asyncio.ensure_future(_crash_at(it, "b", 3))
    await check_step(client, draw_batch(rng, WHOLE, 0), rng)
    await crash
    assert client.repairs >= 1
    assert steps_at(it, "a") == 4  # out and back, nothing twice
    await client.close()


async def _crash_at(it, name, steps):
    await until(lambda: steps_at(it, name) >= steps)
    await it[name].crash()


@scene("a 0:4")
async def test_what_a_server_kept_is_used_and_what_it_lost_is_sent_again(it):
    rng = random.Random(5)
    client = training(it, micro_tokens=1000)
    batch = draw_batch(rng, WHOLE, 0)
    await check_step(client, batch, rng)
    assert steps_at(it, "a") == 8
    trail = await client.forward(batch, is_kept=True)
    it["a"].server.training.kept.forget(it.client.me)
    await client.backward(trail, bytes(len(batch.rows)), lambda *_: None)
    assert steps_at(it, "a") == 8 + 4 + 8
    assert not len(it["a"].server.training.kept)
    await client.close()


@scene("a 0:4", config=ServerConfig(training=TrainingLimits(kept_bytes_per_client=0)))
async def test_a_server_that_keeps_nothing_trains_as_well(it):
    rng = random.Random(6)
    client = training(it)
    await check_step(client, draw_batch(rng, WHOLE, 0), rng)
    await client.close()


@scene("a 0:4", config=ServerConfig(training=TrainingLimits(tensor_bytes_per_client=30_000)))
async def test_tensors_that_made_room_for_others_are_sent_again(it):
    rng = random.Random(7)
    client = training(it, micro_tokens=4)
    for step in range(8):
        await check_step(client, draw_batch(rng, WHOLE, step), rng)
    await client.close()


@scene("a 0:4", config=ServerConfig(training=TrainingLimits(is_open=False)), patience_s=2.0)
async def test_a_server_may_refuse_to_train(it):
    client = training(it)
    with pytest.raises(PeerRefused, match="does not train"):
        await client.forward(draw_batch(random.Random(6), WHOLE, 0), is_kept=False)
    await client.close()


BLOCK_S = 0.1


@scene("a 0:4", iteration_s=0.002, token_s=0.0)
async def test_a_decode_row_waits_for_one_block_at_most(it):
    rng = random.Random(8)
    server = it["a"]
    runs = []
    pace = server.backend.pace

    async def training_pace(rows):
        await asyncio.sleep(BLOCK_S)

    async def decode_pace(calls):
        began_s = now_s()
        await pace(calls)
        runs.append((began_s, now_s()))

    server.backend.pace = decode_pace
    server.backend.training._pace = training_pace
    reader = await it.read(8)
    client = training(it)
    busy = asyncio.ensure_future(_keep_training(client, rng))
    await until(lambda: steps_at(it, "a") > 3)
    slowest_s = 0.0
    for _ in range(20):
        began_s = now_s()
        await reader.decode(1)
        slowest_s = max(slowest_s, now_s() - began_s)
    # The wire both ways, one block, one iteration.
    assert slowest_s <= 2 * 0.005 + BLOCK_S + 0.002 + 1e-6
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)
    spans = sorted(runs + server.backend.training.steps)
    assert all(one[1] <= other[0] + 1e-9 for one, other in itertools.pairwise(spans))
    await client.close()


async def _keep_training(client, rng):
    step = 0
    while True:
        await check_step(client, draw_batch(rng, WHOLE, step), rng)
        step += 1


@scene("a 0:4", iteration_s=0.05)
async def test_training_goes_on_where_answers_leave_no_gap(it):
    rng = random.Random(9)
    readers = [await it.read(4, seed=n) for n in range(4)]
    decoding = [asyncio.ensure_future(reader.decode(400)) for reader in readers]
    client = training(it)
    await check_step(client, draw_batch(rng, WHOLE, 0), rng)
    for task in decoding:
        task.cancel()
    await asyncio.gather(*decoding, return_exceptions=True)
    it.readers.clear()
    for reader in readers:
        reader.session.close()
    await client.close()


@scene("a 0:4", iteration_s=0.02)
async def test_clients_share_the_gaps(it):
    rng = random.Random(10)
    clients = [TrainingClient(await it.open_client()) for _ in range(2)]
    batch = draw_batch(rng, WHOLE, 0)
    done = [0, 0]

    async def train(number, at_once):
        while True:
            await asyncio.gather(
                *(clients[number].forward(batch, is_kept=False) for _ in range(at_once))
            )
            done[number] += at_once

    tasks = [asyncio.ensure_future(train(0, 4)), asyncio.ensure_future(train(1, 1))]
    await asyncio.sleep(8)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # Who asks for more at once gets no more than what the other's pauses leave.
    assert done[1] > 0.6 * done[0]
    for client in clients:
        await client.close()


@scene("a 0:4, b 0:2")
async def test_bad_input_is_refused_at_once_and_the_others_go_on(it):
    rng = random.Random(11)
    client, other = training(it), TrainingClient(await it.open_client())
    batch = replace(draw_batch(rng, WHOLE, 0), trained=None, key=DropoutKey(seed=1, step=1))
    nan = b"\xff" * len(batch.rows)
    with pytest.raises(BadInput, match="not finite"):
        await client.forward(replace(batch, rows=nan), is_kept=True)
    with pytest.raises(BadInput, match="bytes"):
        await client.forward(replace(batch, rows=batch.rows[:-1]), is_kept=True)
    trail = await client.forward(batch, is_kept=True)
    with pytest.raises(BadInput, match="not finite"):
        await client.backward(trail, nan, lambda *_: None)
    await check_step(other, draw_batch(rng, WHOLE, 1), rng)
    assert it["a"].is_up
    await client.close()
    await other.close()


@scene("a 0:2", patience_s=3.0)
async def test_blocks_that_nobody_has_are_named(it):
    client = training(it)
    batch = draw_batch(random.Random(12), Span(0, 2), 0)
    with pytest.raises(NoRouteError, match=r"\[2,4\)"):
        await client.forward(replace(batch, span=WHOLE, trained=None), is_kept=False)
    await client.close()


ROW = 4 * HIDDEN_SIZE


def forward(call, **changes):
    values = {"start": 0, "end": 4, "lengths": [2], "encoding": "float32"}
    micro = Micro(**values | {k: v for k, v in changes.items() if k in values or k == "tensors"})
    num_bytes = changes.get("num_bytes", ROW * sum(micro.lengths))
    return Forward(call, call, micro, False, num_bytes)


LIMITS = TrainingLimits(
    rows_per_pass_max=64, passes_per_client=3, open_bytes_per_client=64 * ROW,
    tensor_bytes_per_client=10_000,
)  # fmt: skip


@scene("a 0:4", config=ServerConfig(training=LIMITS, quotas=Quotas(cache_share=1.0)))
async def test_poisoned_sizes_and_quotas(it):
    channel = await it.client.dial(it["a"].peer, PURPOSE_TRAINING)
    cases = [
        (forward(1, num_bytes=1 << 50), BadInput),
        (forward(2, lengths=[1 << 20]), MessageTooLarge),
        (forward(3, lengths=[40, 40]), MessageTooLarge),
        (forward(4, encoding="float8"), BadInput),
        (forward(5, start=3, end=2), Exception),
        (forward(6, end=9), Exception),
        (PutTensors(7, b"n" * 16, "float32", 2, 1.0, 0.0, False,
                    [_layer(HIDDEN_SIZE)], 1 << 50), AdapterBad),
        (PutTensors(8, b"n" * 16, "float32", 0, 1.0, 0.0, False,
                    [_layer(HIDDEN_SIZE)], 8), AdapterBad),
        (PutTensors(9, b"n" * 16, "float32", 1000, 1.0, 0.0, False,
                    [_layer(HIDDEN_SIZE)], 2 * 4 * 1000 * HIDDEN_SIZE), MessageTooLarge),
    ]  # fmt: skip
    for message, _ in cases:
        await channel.send(message)
    for message, kind in cases:
        answer, _ = await channel.receive()
        assert isinstance(answer, Error)
        assert answer.call == message.call
        assert kind is Exception or answer.code == kind.code, (message, answer)
    visitor = it["a"].server.training._visitors[it.client.me]
    assert not visitor._uploads
    # Announced but not sent: the fourth is one too many, and so are the bytes of a large one.
    for call in (10, 11, 12, 13):
        await channel.send(forward(call))
    answer, _ = await channel.receive()
    assert (answer.call, answer.code) == (13, PeerBusy.code)
    await channel.send(Forget([10, 11, 12]))
    await channel.send(forward(14, lengths=[40]))
    await channel.send(forward(15, lengths=[40]))
    answer, _ = await channel.receive()
    assert (answer.call, answer.code) == (15, PeerBusy.code)
    # What comes of a refused call is dropped, and the stream goes on.
    await channel.send(Chunk(15, 0), b"\0" * 64)
    await channel.send(Chunk(14, 0), bytes(40 * ROW))
    answer, _ = await channel.receive()
    assert answer == Done(14, 40 * ROW, 0)
    await channel.receive()
    await channel.send(forward(16, tensors=b"x" * 16))
    await channel.send(Chunk(16, 0), bytes(2 * ROW))
    answer, _ = await channel.receive()
    assert (answer.call, answer.code) == (16, "adapter_missing")
    await channel.send(Backward(17, 99, forward(17).micro, False, 2 * ROW))
    await channel.send(Chunk(17, 0), bytes(2 * ROW))
    answer, _ = await channel.receive()
    assert (answer.call, answer.code) == (17, "lost")
    # More than was announced is nonsense: the stream ends, the server doesn't.
    await channel.send(forward(18))
    await channel.send(Chunk(18, 0), bytes(3 * ROW))
    answer, _ = await channel.receive()
    assert answer.call == 0
    channel.close()
    client = training(it, micro_tokens=16)
    rng = random.Random(13)
    batch = replace(draw_batch(rng, WHOLE, 0), trained=None)
    await check_step(client, batch, rng)
    await client.close()


def _layer(size):
    from shoal.wire.training import BlockShape, TargetShape

    return BlockShape(0, 0, [TargetShape("toy", size, size)])


@pytest.mark.parametrize("seed", range(12))
def test_gradients_are_right_whatever_fails(seed):
    run_training(draw_plan(seed), steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12, 60))
def test_gradients_are_right_whatever_fails_more(seed):
    run_training(draw_plan(seed))


def garbage(rng, call):
    """A training message that may or may not make sense, and bytes that may belong to it."""
    lengths = [rng.choice((1, 2, 3, 1000, 1 << 20)) for _ in range(rng.randint(1, 3))]
    micro = Micro(
        rng.choice((0, 1, 3, 9)), rng.choice((1, 2, 4, 5, 60_000)), lengths,
        rng.choice(("float32", "bfloat16", "int8-block", "")), rng.choice((b"", b"n" * 16)),
    )  # fmt: skip
    size = rng.choice((0, 1, ROW * sum(lengths), 2 * ROW * sum(lengths), 1 << 53))
    number = rng.randint(0, 5)
    return rng.choice(
        (
            lambda: Forward(call, number, micro, rng.random() < 0.5, size),
            lambda: Backward(call, number, micro, rng.random() < 0.5, size),
            lambda: Forget([number, call]),
            lambda: Chunk(rng.randint(0, call), rng.choice((0, 0, 64, 1 << 40))),
            lambda: PutTensors(
                call, b"n" * 16, rng.choice(("float32", "bfloat16", "?")), rng.choice((0, 1, 2)),
                rng.choice((0.0, 1.0, 1e9)), rng.choice((0.0, 1.0)), False,
                [_layer(rng.choice((1, HIDDEN_SIZE)))], rng.choice((0, 64, 128, 256, 1 << 53)),
            ),
            lambda: Done(call),
        )
    )()  # fmt: skip


@scene("a 0:4")
async def test_garbage_hurts_only_its_sender(it):
    rng = random.Random(14)
    hostile, honest = await it.open_client(), training(it)
    for step in range(12):
        channel = await hostile.dial(it["a"].peer, PURPOSE_TRAINING)
        reading = asyncio.ensure_future(_read_all(channel))
        with suppress(PeerUnreachable):
            for call in range(1, 60):
                message = garbage(rng, call)
                payload = bytes(rng.choice((0, 1, 64, 128, 256)))
                await channel.send(message, payload if isinstance(message, Chunk) else b"")
        await check_step(honest, draw_batch(rng, WHOLE, step), rng)
        channel.close()
        await reading
    await until(lambda: it["a"].server.training.num_clients == 1)
    assert it["a"].backend.training.num_open == 0
    await honest.close()


async def _read_all(channel):
    with suppress(PeerUnreachable, ProtocolError):
        while True:
            await channel.receive()


@scene("a 0:2, b 2:4", iteration_s=0.2, token_s=0.0)
async def test_servers_work_at_the_same_time(it):
    rng = random.Random(15)
    client = training(it, micro_tokens=2)
    batch = replace(draw_batch(rng, WHOLE, 0), lengths=(2,) * 8, trained=None)
    batch = replace(batch, rows=bytes(8 * 2 * ROW))
    began_s = now_s()
    await check_step(client, batch, rng)
    took_s = now_s() - began_s
    # Each server has 8 micro-batches of 2 blocks, out and back, and 0.1 s for a block.
    alone_s = 8 * 2 * 2 * 0.1
    assert took_s < 1.4 * alone_s
    await client.close()


@scene("a 0:4, b 0:2, c 2:4", iteration_s=0.05)
async def test_a_server_moves_or_drains_amid_a_training(it):
    rng = random.Random(16)
    client = training(it, micro_tokens=4)
    changes = [asyncio.ensure_future(it["a"].move(Span(1, 3), load_s=0.3, leave_s=0.5))]
    for step in range(8):
        if step == 5:
            changes.append(asyncio.ensure_future(it["a"].server.drain(1.0)))
        await check_step(client, draw_batch(rng, WHOLE, step), rng)
    await asyncio.gather(*changes)
    await client.close()
