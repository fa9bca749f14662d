"""A TCP proxy that delays what passes, both ways: a far link on one machine, in real time.

For benchmarks: a server announces the proxy's port instead of its own, so everything that is
dialled to it takes the way in and the way back. Bytes are opaque (TLS goes on from end to
end) and keep their order; an end that closes is passed on after the delay.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

PIECE_BYTES: Final = 1 << 16
"""Read at most so much at once."""

PIECES_MAX: Final = 1 << 14
"""Pieces under way: beyond it the sender waits, as on a full link."""

HOST: Final = "127.0.0.1"


@asynccontextmanager
async def delaying(port: int, delay_s: float) -> AsyncIterator[int]:
    """A port that leads to `port` of this machine, `delay_s` later in both directions."""

    tasks: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(_serve(reader, writer, port, delay_s))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(accept, HOST, 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve(
    near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter, port: int, delay_s: float
) -> None:
    try:
        far_in, far_out = await asyncio.open_connection(HOST, port)
    except OSError:
        near_out.close()
        return
    try:
        await asyncio.gather(_carry(near_in, far_out, delay_s), _carry(far_in, near_out, delay_s))
    finally:
        near_out.close()
        far_out.close()


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay_s: float) -> None:
    """Everything from one end to the other, late, its end included."""
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_MAX)
    reading = asyncio.ensure_future(_read(source, under_way, delay_s))
    loop = asyncio.get_running_loop()
    try:
        while True:
            due_s, piece = await under_way.get()
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            if not piece:
                sink.write_eof()
                break
            sink.write(piece)
            await sink.drain()
    except OSError:
        sink.close()  # the other end is gone: nobody wants the rest
    finally:
        reading.cancel()
        with suppress(asyncio.CancelledError):
            await reading


async def _read(
    source: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]], delay_s: float
) -> None:
    loop = asyncio.get_running_loop()
    piece = b"-"
    while piece:
        try:
            piece = await source.read(PIECE_BYTES)
        except ConnectionError:
            piece = b""
        await under_way.put((loop.time() + delay_s, piece))
