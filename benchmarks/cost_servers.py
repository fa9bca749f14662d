"""Servers whose blocks take a given time, in processes of their own, behind far links.

`python cost_servers.py JSON`: the first line on stdout is the server's record; the end of
stdin ends it. Links are real TCP with real TLS; a proxy in each server's process delays what
comes and goes. Start with `running` and `connected`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.discovery.records import open_record
from shoal.discovery.static import StaticDirectory
from shoal.lab.cost_backend import MODEL, CostBackend, CostConfig
from shoal.lab.delay_proxy import delaying
from shoal.lab.sim_swarm import cache_tokens_of, hidden_size_of
from shoal.net.address import parse_listen
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.tcp import TcpTransport
from shoal.plan.placement import Placement
from shoal.plan.spec import DecodeTimes, Problem, ServerSpec
from shoal.server.announcing import Announcement, Announcer, StoreBook
from shoal.server.config import ServerConfig
from shoal.server.quotas import Quotas
from shoal.server.server import open_server
from workers import environment

PASS = SwarmPass.open("benchmark")
WALL_MS = time.time_ns() // 1_000_000


def _order(problem: Problem, placement: Placement, server: int, delay_s: float) -> str:
    """What a server process is told."""
    span, spec = placement.spans[server], problem.servers[server]
    if span is None:
        raise ValueError(f"{spec.name} hosts nothing")
    return json.dumps(
        {
            "name": spec.name,
            "span": [span.start, span.end],
            "num_blocks": problem.num_blocks,
            "hidden_size": hidden_size_of(problem),
            "cache_tokens": cache_tokens_of(problem, placement, server),
            "decode": spec.decode.points,
            "prefill": [spec.prefill_s_per_block, spec.prefill_s_per_block_token],
            "delay_s": delay_s,
        }
    )


def _config(order: dict[str, Any]) -> CostConfig:
    fixed_s, row_s = order["prefill"]
    spec = ServerSpec(
        name=order["name"],
        memory_bytes=0,
        decode=DecodeTimes(points=tuple((batch, seconds) for batch, seconds in order["decode"])),
        prefill_s_per_block=fixed_s,
        prefill_s_per_block_token=row_s,
    )
    return CostConfig(
        server=spec,
        span=Span(*order["span"]),
        num_blocks=order["num_blocks"],
        hidden_size=order["hidden_size"],
        cache_tokens=order["cache_tokens"],
    )


async def serve(order: dict[str, Any]) -> None:
    """A server process: prints its record, serves until stdin ends."""
    config = _config(order)
    backend = CostBackend(config)
    identity, directory = Identity.generate(), StaticDirectory(PASS.name)
    transport = TcpTransport(identity)
    book = StoreBook(directory.store)
    limits = ServerConfig(quotas=Quotas(cache_share=1.0))
    async with open_server(backend, transport, PASS, book, limits) as server:
        listener = await transport.listen(parse_listen("tcp://127.0.0.1:0"), server.serve_stream)
        async with delaying(listener.address.port, order["delay_s"]) as port:
            address = str(replace(listener.address, port=port))
            said = Announcement(
                swarm=PASS.name, boot_ms=WALL_MS, addresses=(address,), facts=backend.facts,
                decode_s_per_block=config.server.decode.at(1),
                prefill_s_per_block_token=config.server.prefill_s_per_block_token,
            )  # fmt: skip
            await Announcer(identity, directory, said).announce("online")
            record = directory.snapshot().records[0].data
            print(base64.b64encode(record).decode(), flush=True)
            await asyncio.to_thread(sys.stdin.read)
    await transport.close()


@contextmanager
def running(
    problem: Problem, placement: Placement, delays_s: Sequence[float]
) -> Iterator[list[bytes]]:
    """The servers of a placement, `delays_s` away one way; gives their records."""
    with ExitStack() as stack:
        started = []
        for server, _ in placement.hosted():
            order = _order(problem, placement, server, delays_s[server])
            process = subprocess.Popen(
                [sys.executable, __file__, order],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(1),
            )  # fmt: skip
            stack.callback(process.communicate)
            started.append(process)
        records = []
        for process in started:
            line = process.stdout.readline().strip() if process.stdout is not None else ""
            if not line:
                raise SystemExit("a server did not start")
            records.append(base64.b64decode(line))
        yield records


@asynccontextmanager
async def connected(
    problem: Problem, placement: Placement, records: Sequence[bytes]
) -> AsyncIterator[tuple[Client, dict[PeerId, int]]]:
    """A client of these servers, and their numbers in the problem."""
    identity = Identity.generate()
    config = ClientConfig(
        model=MODEL, num_blocks=problem.num_blocks, hidden_size=hidden_size_of(problem)
    )
    directory = StaticDirectory(PASS.name, records)
    transport = TcpTransport(identity)
    hosted = [server for server, _ in placement.hosted()]
    numbers = {
        PeerId(open_record(record).peer): server
        for record, server in zip(records, hosted, strict=True)
    }
    async with open_client(
        identity, transport, PASS, directory, config,
        rng=random.Random(1), wall_clock=lambda: WALL_MS / 1000,
    ) as client:  # fmt: skip
        yield client, numbers
    await transport.close()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
