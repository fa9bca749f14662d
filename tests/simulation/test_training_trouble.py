"""Training over slow links, with servers that only count, move away, or say what is not so."""

import asyncio
import random
from collections import deque
from dataclasses import replace

import pytest

from shoal.base.errors import (
    BadInput,
    PeerTimeout,
)
from shoal.base.spans import Span
from shoal.client import training_batch
from shoal.client.training import TrainConfig, TrainingClient
from shoal.client.training_batch import InOrder
from shoal.client.training_link import OWED_S, STUCK_S
from shoal.lab.clock import run_virtual
from shoal.lab.network import LinkConditions
from shoal.lab.toy_blocks import HIDDEN_SIZE, finite_row
from shoal.lab.training_runs import check_step, draw_batch
from shoal.server import training_stream
from tests.simulation.scene import now_s, scene, until

WHOLE = Span(0, 4)
ROW = 4 * HIDDEN_SIZE


def training(it, **config):
    return TrainingClient(it.client, TrainConfig(**config))


def steps_at(it, name):
    """Steps that a server ran."""
    return len(it[name].backend.training.steps)


@scene("a 0:4", timeout_s=5000.0)
async def test_a_slow_link_trains(it):
    """Uploads of minutes to a server that has nothing else to do."""
    rng = random.Random(17)
    slow = LinkConditions(delay_s=0.05, rate_bytes_per_s=4500.0)
    it.network.set_link(it.client.me, it["a"].peer, slow)
    it.network.set_link(it["a"].peer, it.client.me, slow)
    client = training(it, micro_tokens=2048)
    batch = replace(draw_batch(rng, WHOLE, 0), lengths=(2048,) * 6, trained=None)
    batch = replace(batch, rows=bytes(12288 * ROW))
    began_s = now_s()
    await check_step(client, batch, rng)
    assert now_s() - began_s > 2 * STUCK_S
    assert client.repairs == 0
    await client.close()


@scene("a 0:4", patience_s=5.0, timeout_s=5000.0)
async def test_a_server_that_only_counts_is_left(it):
    queue = it["a"].server.training.queue
    it["a"].backend.training._pace = _never

    async def count():
        while True:
            await asyncio.sleep(5)
            queue.steps += 1

    counting = asyncio.ensure_future(count())
    client = training(it)
    began_s = now_s()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_stream, "IDLE_S", 10 * OWED_S)  # it does not give up either
        with pytest.raises(PeerTimeout, match="does not answer"):
            await client.forward(draw_batch(random.Random(18), WHOLE, 0), is_kept=False)
    assert now_s() - began_s < 3 * OWED_S
    counting.cancel()
    await client.close()


async def _never(_rows):
    await asyncio.Event().wait()


@scene("a 0:4, b 0:4", iteration_s=0.05)
async def test_a_move_lets_go_of_passes_and_ends_no_run(it):
    rng = random.Random(17)
    client = training(it, micro_tokens=4, lanes_max=1)
    batch = draw_batch(rng, WHOLE, 0)
    working = asyncio.ensure_future(check_step(client, batch, rng))
    await until(lambda: steps_at(it, "a") + steps_at(it, "b") > 1)
    name = "a" if steps_at(it, "a") else "b"
    old = it[name].backend.training
    moving = asyncio.ensure_future(it[name].move(Span(1, 3), load_s=0.0, leave_s=60.0))
    await until(lambda: it[name].server.training.facts.span == Span(1, 3))
    assert not old.num_open
    await working
    await moving
    await client.close()


@scene("a 0:4, spare-b 0:4")
async def test_one_servers_word_ends_no_run_and_two_do(it):
    def refuse(*_, **__):
        raise BadInput("bad, believe me")

    rng = random.Random(20)
    client = training(it, lanes_max=1)
    it["a"].backend.training.begin = refuse
    await check_step(client, draw_batch(rng, WHOLE, 0), rng)
    assert client.repairs
    it["spare-b"].backend.training.begin = refuse
    began_s = now_s()
    with pytest.raises(BadInput, match="believe me"):
        await client.forward(draw_batch(rng, WHOLE, 1), is_kept=False)
    assert now_s() - began_s < 10
    await client.close()


@scene("a 0:4, spare-b 0:4")
async def test_gradients_come_in_one_order_whoever_is_there(it):
    rng = random.Random(19)
    client = training(it)
    drawn = draw_batch(rng, WHOLE, 0)
    batch = replace(drawn, lengths=(40,) * 20, rows=finite_row(b"r", 800 * ROW))
    told = []
    for _ in range(2):
        trail = await client.forward(batch, is_kept=True)
        found = {}
        await client.backward(
            trail,
            batch.rows,
            lambda block, values, to=found: to.setdefault(block, []).append(values),
        )
        told.append((found, [part.lengths for part in trail.parts]))
        await it["spare-b"].crash()
    assert told[0] == told[1]
    assert len(told[0][1]) > 4
    await client.close()


@pytest.mark.parametrize("held_bytes_max", [0, 200, 1 << 20])
def test_little_waits_for_an_earlier_micro_batch(held_bytes_max, monkeypatch):
    monkeypatch.setattr(training_batch, "HELD_BYTES_MAX", held_bytes_max)

    async def run():
        rng, told, begun = random.Random(21), [], deque(range(12))
        in_order = InOrder(range(12), lambda block, _: told.append(block))
        most = 0

        async def work():
            nonlocal most
            while begun:
                await in_order.room()
                if begun:
                    number = begun.popleft()
                    await asyncio.sleep(rng.uniform(1, 9))
                    in_order.came(number, [(number, bytes(100))])
                    most = max(most, in_order._held_bytes())

        await asyncio.gather(*(work() for _ in range(4)))
        assert told == list(range(12))
        assert most <= held_bytes_max + 4 * 100

    run_virtual(run)
