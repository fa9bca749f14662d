"""How fast does a long prompt go through 1, 2 and 3 servers, its chunks in a pipeline?

The baseline is transformers in this process, one thread, the whole prompt in one call; our
own engine does the same beside it, whole and in chunks. bfloat16; the chain's time runs from
handing over the rows to the last one's answer. On a machine with fewer cores than servers
the servers take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from model_servers import Server, connected, random_rows, running, workers_of
from random_model import SHAPES, saved_folder, saved_source
from report import environment, publish
from rounds import Rounds, Way, take_rounds
from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span
from shoal.client.chain_session import choose_chunk
from shoal.client.client import Client
from shoal.model.torch_backend import BackendConfig, load_backend

LENGTHS = (512, 2048)
SERVERS = (1, 2, 3)
BASELINE = "transformers, 1 process"
WHOLE = "our engine, 1 process"
CHUNKED = "our engine, 1 process, chunks"


def transformers_alone(shape: str, prompt: bytes, length: int) -> Callable[[], Awaitable[float]]:
    """Rows/s of transformers' blocks, attention as it chooses, KV cache kept."""
    model = AutoModelForCausalLM.from_pretrained(saved_folder(shape), dtype=torch.bfloat16)
    blocks = model.get_decoder()
    rows = torch.frombuffer(bytearray(prompt), dtype=torch.bfloat16).view(1, length, -1)

    async def measure() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            blocks(inputs_embeds=rows, use_cache=True)
        return length / (time.perf_counter() - started)

    return measure


def alone(backend: BlockBackend, prompt: bytes, chunk: int) -> Callable[[], Awaitable[float]]:
    """Rows/s of one process without a network."""
    facts = backend.facts
    row = facts.hidden_size * 2
    length = len(prompt) // row

    async def measure() -> float:
        backend.open(SequenceId(1), facts.span)
        started = time.perf_counter()
        for at in range(0, length, chunk):
            call = Call(
                sequence=SequenceId(1), span=facts.span, position=at, count=chunk,
                call_count=chunk, payload=prompt[at * row : (at + chunk) * row],
                encoding="bfloat16", output_encoding="bfloat16", rows_wanted=1,
            )  # fmt: skip
            (outcome,) = await backend.run([call])
            if not isinstance(outcome, bytes):
                raise outcome
        taken = time.perf_counter() - started
        backend.close(SequenceId(1))
        return length / taken

    return measure


def through(client: Client, prompt: bytes, length: int) -> Callable[[], Awaitable[float]]:
    """Rows/s of a chain."""

    async def measure() -> float:
        async with await client.open_session("bfloat16") as session:
            started = time.perf_counter()
            await session.step(prompt, length)
            return length / (time.perf_counter() - started)

    return measure


async def measured(
    shape: str, swarms: dict[str, list[Server]], wanted: int
) -> dict[tuple[int, str], Rounds]:
    """Rounds by prompt length and way."""
    span = Span(0, int(SHAPES[shape]["num_hidden_layers"]))
    config = BackendConfig(model=shape, dtype="bfloat16", cache_tokens=1 << 14)
    backend = load_backend(saved_source(shape), span, config)
    rounds: dict[tuple[int, str], Rounds] = {}
    async with AsyncExitStack() as stack:
        stack.push_async_callback(backend.aclose)
        clients = {
            name: await stack.enter_async_context(connected(shape, servers))
            for name, servers in swarms.items()
        }
        for length in LENGTHS:
            prompt = random_rows(shape, length)
            me = {"process": os.getpid()}
            ways = {
                BASELINE: Way(workers=me, measure=transformers_alone(shape, prompt, length)),
                WHOLE: Way(workers=me, measure=alone(backend, prompt, length)),
                CHUNKED: Way(workers=me, measure=alone(backend, prompt, choose_chunk(length))),
            }
            for name, servers in swarms.items():
                workers = {**workers_of(servers), "client": os.getpid()}
                ways[name] = Way(workers=workers, measure=through(clients[name], prompt, length))
            taken = await take_rounds(ways, wanted)
            rounds |= {(length, name): taken[name] for name in ways}
    return rounds


def main() -> None:
    """Rows/s by prompt length and number of servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape, 1 round")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--shape", choices=SHAPES, help="another shape than the usual")
    parser.add_argument("--rounds", type=int, default=3, help="that count, of every way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = options.shape or ("small" if options.quick else "1.1b")
    facts = environment()
    with ExitStack() as stack:
        swarms = {
            f"{count} server{'s' * (count > 1)}": stack.enter_context(running(shape, count))
            for count in SERVERS
        }
        rounds = asyncio.run(measured(shape, swarms, 1 if options.quick else options.rounds))
    rows: list[dict[str, object]] = []
    details: dict[str, Any] = {}
    for (length, way), taken in rounds.items():
        rows.append(
            {"shape": shape, "rows": length, "way": way, "rows_per_s": taken.median,
             "gain": taken.over(rounds[length, BASELINE]),
             "over_our_engine": taken.over(rounds[length, WHOLE]), **taken.cells()}
        )  # fmt: skip
        details[f"{length} rows, {way}"] = taken.details()
    publish("prefill", rows, facts, details)


if __name__ == "__main__":
    main()
