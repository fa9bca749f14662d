"""One node of a ring on a core of its own: `python ring_node.py SHAPE QUANTIZE START:END CORE`.

A worker (see workers.py). The first request is answered with its record; any other one with what
it has done and what memory it takes.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
from typing import Any

import torch

from model_servers import PASS, WALL_MS
from random_model import saved_source
from shoal.base.spans import Span, parse_span
from shoal.cli.ring_host import probe
from shoal.cli.ring_memory import give_back_early, process_memory, trim
from shoal.discovery.static import StaticDirectory
from shoal.model.quantize import Quantization, quantization
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.net.address import parse_listen
from shoal.net.identity import Identity
from shoal.net.tcp import TcpTransport
from shoal.server.announcing import Announcement, Announcer, StoreBook
from shoal.server.config import ServerConfig
from shoal.server.quotas import Quotas
from shoal.server.server import open_server
from workers import answer, requests

CACHE_TOKENS = 1 << 14


async def serve(shape: str, quantize: Quantization, span: Span) -> None:
    """Until stdin ends."""
    sys.setswitchinterval(0.0005)
    empty_bytes = process_memory().resident
    config = BackendConfig(
        model=shape, dtype="bfloat16", quantize=quantize, cache_tokens=CACHE_TOKENS
    )
    _, times = await probe(saved_source(shape), config)
    offered_bytes = process_memory().resident  # what blocks and caches come to, as nodes count
    backend = load_backend(saved_source(shape), span, config)
    trim()
    identity, directory = Identity.generate(), StaticDirectory(PASS.name)
    transport = TcpTransport(identity)
    book, limits = StoreBook(directory.store), ServerConfig(quotas=Quotas(cache_share=1.0))
    async with open_server(backend, transport, PASS, book, limits) as server:
        listener = await transport.listen(parse_listen("tcp://127.0.0.1:0"), server.serve_stream)
        said = Announcement(
            swarm=PASS.name, boot_ms=WALL_MS, addresses=(str(listener.address),),
            facts=backend.facts, decode_s_per_block=times.decode_s_per_block,
            prefill_s_per_block_token=times.prefill_s_per_block_token,
            decode_s_by_batch=times.decode_s_by_batch,
        )  # fmt: skip
        await Announcer(identity, directory, said).announce("online")
        record = base64.b64encode(directory.snapshot().records[0].data).decode()
        now = asyncio.get_running_loop().time
        async for request in requests():
            looked: dict[str, Any] = {
                "busy_s": server.engine.busy_s(now()), "at_s": now(),
                "iterations": server.engine.iteration, "rows": server.engine.rows,
                "empty_bytes": empty_bytes, "offered_bytes": offered_bytes,
                "resident_bytes": process_memory().resident,
                "peak_bytes": process_memory().peak,
            }  # fmt: skip
            answer(record if request == "record" else looked)
    await transport.close()
    await backend.aclose()


if __name__ == "__main__":
    os.sched_setaffinity(0, {int(sys.argv[4])})
    torch.set_num_threads(1)
    give_back_early()  # as nodes do
    asyncio.run(serve(sys.argv[1], quantization(sys.argv[2]), parse_span(sys.argv[3])))
