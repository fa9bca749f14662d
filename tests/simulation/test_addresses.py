"""Twenty identities from one address: they take what one address may, and others are served."""

import asyncio
import random

from shoal.base.errors import PeerBusy
from shoal.lab.toy_adapters import toy_adapter
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.net.channel import PURPOSE_ADAPTERS, PURPOSE_TRAINING
from shoal.server import adapter_streams, training
from shoal.server.config import ServerConfig
from shoal.server.quotas import Quotas
from shoal.server.training_limits import TrainingLimits
from shoal.wire.adapters import OfferAdapter, WantAdapter
from shoal.wire.messages import Error
from shoal.wire.training import Forward, Micro
from tests.simulation.scene import scene

CROWD = 20
ROWS = 64
ROW_BYTES = ROWS * 4 * HIDDEN_SIZE


async def crowd(it):
    """So many clients of one address, and one of another."""
    clients = [await it.open_client() for _ in range(CROWD + 1)]
    for client in clients:
        it.swarm.memory.hosts[client.me] = "203.0.113.7"
    it.swarm.memory.hosts[clients[-1].me] = "2001:db8::1"
    return clients[:-1], clients[-1]


def refusals(answers):
    return [answer for answer in answers if isinstance(answer, Error)]


CALLS = TrainingLimits(answer_bytes_per_client=ROW_BYTES, answer_bytes_max=8 * ROW_BYTES)


@scene("a 0:1", config=ServerConfig(training=CALLS))
async def test_answers_of_training_and_places_to_train(it):
    many, other = await crowd(it)
    streams = [await one.dial(it["a"].peer, PURPOSE_TRAINING) for one in many]
    forward = Forward(1, 1, Micro(0, 1, [ROWS], "float32"), False, ROW_BYTES)
    waiting = [asyncio.ensure_future(stream.receive()) for stream in streams]
    for stream in streams:
        await stream.send(forward)
    await asyncio.sleep(0.1)
    refused = refusals(one.result()[0] for one in waiting if one.done())
    assert [one.code for one in refused] == [PeerBusy.code] * (CROWD - 6)  # of 8, one may have 6
    stream = await other.dial(it["a"].peer, PURPOSE_TRAINING)
    await stream.send(forward)
    answer = asyncio.ensure_future(stream.receive())
    await asyncio.sleep(0.1)
    assert not answer.done() or not isinstance(answer.result()[0], Error)
    for one in (*waiting, answer):
        one.cancel()
    for one in (*streams, stream):
        one.close()
    assert training.CLIENTS_MAX > CROWD


@scene("a 0:2")
async def test_adapters_on_their_way(it):
    many, other = await crowd(it)
    part = toy_adapter(random.Random(1), 2)
    offer = OfferAdapter(1, part.manifest.name), part.manifest.text()
    answers, streams = [], []
    for client in (*many, other):
        stream = await client.dial(it["a"].peer, PURPOSE_ADAPTERS)
        streams.append(stream)
        await stream.send(*offer)
        answers.append((await stream.receive())[0])
    places = adapter_streams.STREAMS_MAX * 3 // 4
    assert len(refusals(answers[:-1])) == CROWD - places
    assert answers[-1] == WantAdapter(1, 0, 2)
    for stream in streams:
        stream.close()


SMALL_SHARE = ServerConfig(quotas=Quotas(cache_share=0.25))


@scene("a 0:2", config=SMALL_SHARE, cache_tokens=20 * 64)
async def test_small_shares_of_the_cache(it):
    many, other = await crowd(it)
    readers = [await it.read(client=client) for client in many]
    reading = [asyncio.ensure_future(reader.prefill(100)) for reader in readers]
    await asyncio.sleep(2.0)
    ledger = it["a"].server.sessions.ledger
    assert 0 < sum(ledger.held(hop.sequence) for hop in it.hops("a")) <= ledger.total * 3 // 4
    stranger = await it.read(client=other)
    await stranger.prefill(200)
    await stranger.decode(3)
    for reader in readers:
        reader.session.close()
    for one in reading:
        one.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    it.readers = [one for one in it.readers if one is stranger]
