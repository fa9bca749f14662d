"""The processes that hop.py measures: servers whose blocks compute nothing, and an echo.

`python processes.py echo`, or `python processes.py START:END HIDDEN_SIZE [busy]`: the
first line on stdout is the port, or the server's record; the end of stdin ends it.
"""

from __future__ import annotations

import asyncio
import base64
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from shoal.base.adapters import AdapterId
from shoal.base.backend import BackendFacts, Call, NoAdapters, Outcome, SequenceId
from shoal.base.spans import Span, parse_span
from shoal.discovery.static import StaticDirectory
from shoal.net.address import parse_listen
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.tcp import TcpTransport
from shoal.server.announcing import Announcement, Announcer, StoreBook
from shoal.server.server import open_server

BLOCKS = 3
PASS = SwarmPass.open("benchmark")
WALL_MS = time.time_ns() // 1_000_000


class Wire(NoAdapters):
    """A backend whose blocks hand rows through: what is left is everything else."""

    def __init__(self, span: Span, hidden_size: int) -> None:
        self.facts = BackendFacts(
            model="wire", span=span, num_blocks=BLOCKS, hidden_size=hidden_size,
            encodings=("bfloat16",), numerics="wire", is_exact=True, cache_tokens=1 << 16,
            page_tokens=32, session_tokens_max=1 << 16,
        )  # fmt: skip

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Nothing is kept."""

    def close(self, sequence: SequenceId) -> None:
        """Nothing is kept."""

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Nothing is kept."""
        return length

    def fork(self, parent: SequenceId, child: SequenceId, length: int) -> int:
        """Nothing is kept."""
        return length

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """The rows as they came."""
        return [bytes(call.payload) if call.rows_wanted else b"" for call in calls]

    def trainer(self) -> None:
        """Nobody trains here."""

    async def aclose(self) -> None:
        """Nothing to free."""


def burn() -> None:
    """What an engine's thread does: matrix products, which free the interpreter, and glue."""
    import numpy as np

    square = np.ones((192, 192), dtype=np.float32)
    while True:
        square = square @ square * 0 + 1
        sum(range(300))


async def serve(span: Span, hidden_size: int, is_busy: bool) -> None:
    """A server process: prints its record, serves until stdin ends."""
    sys.setswitchinterval(0.0005)
    if is_busy:
        threading.Thread(target=burn, daemon=True).start()
    identity, directory = Identity.generate(), StaticDirectory(PASS.name)
    transport, backend = TcpTransport(identity), Wire(span, hidden_size)
    book = StoreBook(directory.store)
    async with open_server(backend, transport, PASS, book) as server:
        listener = await transport.listen(parse_listen("tcp://127.0.0.1:0"), server.serve_stream)
        address = str(listener.address)
        said = Announcement(
            swarm=PASS.name, boot_ms=WALL_MS, addresses=(address,), facts=backend.facts
        )
        await Announcer(identity, directory, said).announce("online")
        print(base64.b64encode(directory.snapshot().records[0].data).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    await transport.close()


async def echo() -> None:
    """A raw TCP echo process."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            writer.write(data)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


@contextmanager
def running(*arguments: str) -> Iterator[str]:
    """Such a process, while it is needed; gives the first line it prints."""
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


if __name__ == "__main__":
    if sys.argv[1] == "echo":
        asyncio.run(echo())
    else:
        asyncio.run(serve(parse_span(sys.argv[1]), int(sys.argv[2]), "busy" in sys.argv))
