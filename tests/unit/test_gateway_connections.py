"""Connections that stand still are ended, pauses are filled, logs stay ours."""

import asyncio
import logging
import socket

import pytest

from shoal.base.errors import BadInput, BadOutput
from shoal.gateway import connection, http, listening
from shoal.gateway.errors import from_shoal
from shoal.gateway.front import Front, FrontConfig
from shoal.gateway.http import EventStream, send_whole
from shoal.gateway.keys import Keys
from shoal.gateway.listening import Listening, serving
from shoal.gateway.meter import Meter
from shoal.lab.clock import run_virtual

BIG = bytes(8 << 20)


async def app(scope, receive, send):
    await send_whole(send, BIG if scope["path"] == "/big" else b"hello", kind="text/plain")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(connection, "HEADERS_S", 0.3)
    monkeypatch.setattr(connection, "STUCK_S", 0.3)
    monkeypatch.setattr(connection, "TICK_S", 0.05)
    monkeypatch.setattr(http, "WRITE_S", 0.3)


def served(story):
    """Run a story with the port of a server."""

    async def work():
        async with serving(app, Listening(host="127.0.0.1", port=0)) as url:
            await story(int(url.rsplit(":", 1)[1]))

    asyncio.run(work())


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_half_a_request_is_not_waited_for(quick, said):
    async def story(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(said)
        assert await reader.read() == b""
        writer.close()

    served(story)


def test_half_a_second_request_is_not_waited_for_and_whole_ones_are_answered(quick):
    async def story(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        writer.write(b"GET")
        assert await reader.read() == b""
        writer.close()

    served(story)


def test_who_reads_nothing_is_cut_off(quick, monkeypatch):
    lost = asyncio.Event()

    class Told(connection.TimedConnection):
        def connection_lost(self, exc):
            super().connection_lost(exc)
            lost.set()

    monkeypatch.setattr(listening, "TimedConnection", Told)

    async def story(port):
        loop = asyncio.get_running_loop()
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        await loop.sock_connect(deaf, ("127.0.0.1", port))
        await loop.sock_sendall(deaf, b"GET /big HTTP/1.1\r\nHost: x\r\n\r\n")
        with deaf:
            async with asyncio.timeout(10):
                await lost.wait()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        writer.close()

    served(story)


def test_pauses_of_a_stream_are_filled_with_comments():
    sent = []

    async def send(message):
        sent.append(message)

    async def story():
        stream = EventStream(send)
        async with stream.kept_alive():
            await asyncio.sleep(25)
            assert sent == []  # in the line: the status is not decided
            stream.may_open = True
            await asyncio.sleep(25)
            assert sent[0]["status"] == 200
            assert [one["body"] for one in sent[1:]] == [b": still here\n\n"] * 2
            await stream.open()
            for _ in range(5):
                await stream.event({"a": 1})
                await asyncio.sleep(5)
            await stream.close()
        await asyncio.sleep(100)

    run_virtual(story())
    assert [one["type"] for one in sent].count("http.response.start") == 1
    assert [one["body"] for one in sent[3:]] == [b'data: {"a":1}\n\n'] * 5 + [b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"host": b"["}, 403),
        ({"host": b"127.0.0.1", "origin": b"http://["}, 403),
        ({"host": b"127.0.0.1"}, 200),
    ],
)
def test_hosts_that_are_none_are_refused_and_paths_write_no_log_lines(fields, status, caplog):
    found = []
    front = Front(
        app, FrontConfig(keys=Keys({}), guarded=(), hosts=frozenset({"127.0.0.1"})),
        Meter(lambda recovery: None),
    )  # fmt: skip

    async def send(message):
        found.append(message)

    scope = {
        "type": "http", "method": "GET", "path": "/a\nERROR forged" + "x" * 500,
        "headers": [(name.encode(), value) for name, value in fields.items()],
    }  # fmt: skip
    with caplog.at_level(logging.INFO, "shoal.gateway.front"):
        asyncio.run(front(scope, None, send))
    assert found[0]["status"] == status
    (line,) = caplog.messages
    assert "\n" not in line
    assert len(line) < 400


def test_whose_fault_it_is():
    told = from_shoal(BadOutput("the model's scores are not numbers"))
    assert (told.status, told.code) == (500, "bad_output")
    assert from_shoal(BadInput("options")).status == 400


def test_a_whole_stream_is_no_caller_who_left():
    """Clients hang up with the last event: nothing may be left to be cancelled."""
    hung_up = asyncio.Event()

    async def send(message):
        if not message.get("more_body", True):
            hung_up.set()
            await asyncio.sleep(0)

    async def receive():
        await hung_up.wait()
        return {"type": "http.disconnect"}

    async def work():
        stream = EventStream(send)
        async with stream.kept_alive():
            await stream.open()
            await stream.event({})
            await stream.close()
        return "done"

    async def story():
        assert await http.while_connected(receive, work()) == "done"

    asyncio.run(story())
