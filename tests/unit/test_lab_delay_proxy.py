"""The delaying proxy: nothing is lost or reordered, ends are passed on, and it takes its time."""

from __future__ import annotations

import asyncio

from shoal.lab.delay_proxy import HOST, delaying

DELAY_S = 0.02


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1000):
        writer.write(data.upper())
    writer.write(b"end")
    writer.close()


def test_bytes_come_late_in_order_and_the_end_is_passed_on() -> None:
    async def story() -> None:
        server = await asyncio.start_server(echo, HOST, 0)
        async with delaying(server.sockets[0].getsockname()[1], DELAY_S) as port:
            reader, writer = await asyncio.open_connection(HOST, port)
            loop = asyncio.get_running_loop()
            started_s = loop.time()
            writer.write(b"first")
            assert await reader.readexactly(5) == b"FIRST"
            assert loop.time() - started_s >= 2 * DELAY_S - 0.001
            letters = bytes(range(97, 123)) * 10_000
            writer.write(letters)
            assert await reader.readexactly(len(letters)) == letters.upper()
            writer.write_eof()
            assert await reader.read() == b"end"
            writer.close()
        server.close()

    asyncio.run(story())


def test_nobody_behind_it_closes_the_connection() -> None:
    async def story() -> None:
        server = await asyncio.start_server(echo, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with delaying(port, 0.0) as outside:
            reader, writer = await asyncio.open_connection(HOST, outside)
            assert await reader.read() == b""
            writer.close()

    asyncio.run(story())
