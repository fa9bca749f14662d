"""What a server tells Prometheus, and what its streams count."""

import asyncio
import random

from prometheus_client.parser import text_string_to_metric_families

from shoal.base.ids import PeerId, short
from shoal.base.spans import Span
from shoal.lab.clock import run_virtual
from shoal.lab.network import SimulatedNetwork
from shoal.lab.script import toy_embedding
from shoal.lab.swarm import ServerSpec, SimulatedSwarm
from shoal.net.address import ListenAddress
from shoal.net.identity import Identity
from shoal.net.memory import SCHEME, MemoryNetwork
from shoal.net.metering import MeteredTransport, TrafficBook
from shoal.server.meter import ServerMeter


def values(meter):
    families = text_string_to_metric_families(meter.text().decode())
    return {
        (one.name.removeprefix("shoal_server_"), one.labels.get("peer")): one.value
        for family in families
        for one in family.samples
    }


def test_rows_sessions_and_cache_are_told():
    async def story():
        rng = random.Random(1)
        specs = [ServerSpec(name="a", span=Span(0, 4), head="toy")]
        async with SimulatedSwarm(specs, SimulatedNetwork(rng), rng, num_blocks=4) as swarm:
            server = swarm.servers[0]
            book = TrafficBook()
            book.of(PeerId(b"p" * 32)).sent_bytes += 7
            clock = asyncio.get_running_loop().time
            meter = ServerMeter(server.server, book, clock, server.heads)
            client = await swarm.open_client()
            session = await client.open_session("float32")
            await session.step(b"".join(map(toy_embedding, range(40))), 40)
            found = values(meter)
            assert found["rows_total", None] == 40
            assert found["iterations_total", None] >= 1
            assert found["busy_seconds_total", None] > 0
            assert found["sessions", None] == found["sessions_opened_total", None] == 1
            assert found["sessions_rebuilt_total", None] == 0
            free, pages = found["cache_pages_free", None], found["cache_pages", None]
            assert (pages - free) * found["cache_page_tokens", None] >= 40
            assert found["log_bytes", None] > 0
            assert found["sent_bytes_total", short(b"p" * 32)] == 7
            assert found["head_answers", None] == 0
            session.close()
            await asyncio.sleep(1)
            assert values(meter)["sessions", None] == 0

    run_virtual(story())


def test_traffic_is_counted_in_bounded_memory():
    book = TrafficBook(peers_max=2)
    for name in b"abca":
        book.of(PeerId(bytes([name]) * 32)).received_bytes += 10
    assert {peer[:1]: one.received_bytes for peer, one in book.by_peer().items()} == {
        b"c": 10,
        b"a": 10,  # counted anew
    }
    assert book.others.received_bytes == 20


def test_streams_count_both_ways():
    async def story():
        network = MemoryNetwork(SimulatedNetwork(random.Random(1)))
        ears, mouth = (
            MeteredTransport(network.transport(Identity.from_seed(bytes([n]) * 32).peer))
            for n in (1, 2)
        )

        async def echo(stream):
            frame = await stream.receive()
            await stream.send(frame.header, frame.payload)
            await stream.receive()

        listener = await ears.listen(ListenAddress(SCHEME, "x", 1), echo)
        stream = await mouth.dial(listener.address)
        await stream.send(b"abc", b"defgh")
        await stream.receive()
        for transport, peer in ((ears, mouth.peer), (mouth, ears.peer)):
            counted = transport.traffic.by_peer()[peer]
            assert (counted.sent_bytes, counted.received_bytes) == (8, 8)
        stream.close()
        await mouth.close()
        await ears.close()

    run_virtual(story())
