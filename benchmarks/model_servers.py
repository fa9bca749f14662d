"""Servers of a random model in processes of their own, and a client of theirs.

`python model_servers.py SHAPE START:END`: the first line on stdout is the server's record;
the end of stdin ends it. One compute thread each, bfloat16.
"""

from __future__ import annotations

import asyncio
import base64
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from random_model import SHAPES, saved_folder, saved_source
from shoal.base.spans import Span, parse_span
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.discovery.static import StaticDirectory
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.net.address import parse_listen
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.tcp import TcpTransport
from shoal.server.announcing import Announcement, Announcer, StoreBook
from shoal.server.server import open_server
from workers import environment

PASS = SwarmPass.open("benchmark")
WALL_MS = time.time_ns() // 1_000_000
CACHE_TOKENS = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server process."""

    record: str
    """What it says about itself, for a client's directory."""
    pid: int
    span: Span


def workers_of(servers: Iterable[Server]) -> Mapping[str, int]:
    """Their names and process ids."""
    return {f"server {server.span}": server.pid for server in servers}


async def serve(shape: str, span: Span) -> None:
    """A server process: prints its record, serves until stdin ends."""
    sys.setswitchinterval(0.0005)
    config = BackendConfig(model=shape, dtype="bfloat16", cache_tokens=CACHE_TOKENS)
    backend = load_backend(saved_source(shape), span, config)
    identity, directory = Identity.generate(), StaticDirectory(PASS.name)
    transport = TcpTransport(identity)
    book = StoreBook(directory.store)
    async with open_server(backend, transport, PASS, book) as server:
        listener = await transport.listen(parse_listen("tcp://127.0.0.1:0"), server.serve_stream)
        said = Announcement(
            swarm=PASS.name, boot_ms=WALL_MS, addresses=(str(listener.address),),
            facts=backend.facts,
        )  # fmt: skip
        await Announcer(identity, directory, said).announce("online")
        print(base64.b64encode(directory.snapshot().records[0].data).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.read)
    await transport.close()
    await backend.aclose()


@contextmanager
def running(shape: str, num_servers: int) -> Iterator[list[Server]]:
    """So many servers, which share the blocks evenly."""
    blocks = int(SHAPES[shape]["num_hidden_layers"])
    borders = [blocks * index // num_servers for index in range(num_servers + 1)]
    saved_folder(shape)  # before several processes want to write it
    with ExitStack() as stack:
        started = []
        for start, end in pairwise(borders):
            process = subprocess.Popen(
                [sys.executable, __file__, shape, f"{start}:{end}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(1),
            )  # fmt: skip
            stack.callback(process.communicate)
            started.append((Span(start, end), process))
        servers = []
        for span, process in started:
            record = process.stdout.readline().strip() if process.stdout is not None else ""
            if not record:
                raise SystemExit(f"the server of blocks {span} did not start")
            servers.append(Server(record=record, pid=process.pid, span=span))
        yield servers


@asynccontextmanager
async def connected(shape: str, servers: Sequence[Server]) -> AsyncIterator[Client]:
    """A client of these servers."""
    identity = Identity.generate()
    sizes = SHAPES[shape]
    config = ClientConfig(
        model=shape, num_blocks=sizes["num_hidden_layers"], hidden_size=sizes["hidden_size"]
    )
    records = [base64.b64decode(server.record) for server in servers]
    directory = StaticDirectory(PASS.name, records)
    transport = TcpTransport(identity)
    async with open_client(
        identity, transport, PASS, directory, config,
        rng=random.Random(1), wall_clock=lambda: WALL_MS / 1000,
    ) as client:  # fmt: skip
        yield client
    await transport.close()


def random_rows(shape: str, count: int) -> bytes:
    """Hidden states in bfloat16."""
    rows = torch.randn(count, int(SHAPES[shape]["hidden_size"])).to(torch.bfloat16)
    return bytes(rows.view(torch.uint8).numpy())


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], parse_span(sys.argv[2])))
