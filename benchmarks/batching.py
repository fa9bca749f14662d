"""How much more do many sessions get out of two servers than one session does?

Every session decodes on its own (a prompt of 32 rows, then token after token); the figure
is tokens/s of all of them together. Two server processes with one thread each, one client
process, bfloat16. The client applies the head once per arriving frame, whoever's rows are
in it, and takes the likeliest token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import torch

from head_batch import HeadBatch
from model_servers import Server, connected, random_rows, running, workers_of
from random_model import saved_source
from report import environment, publish
from rounds import Rounds, Way, take_rounds
from shoal.client.chain_session import ChainSession
from shoal.hf.head import load_head

SESSIONS = (1, 8, 16, 32)
PROMPT = 32
SETTLE = 2
"""Tokens before the clock starts: who shares an iteration settles by itself."""


async def decode(session: ChainSession, heads: HeadBatch, row: bytes, tokens: int) -> bytes:
    """So many tokens; the row of the last one."""
    for _ in range(tokens):
        row = await session.step(heads.embed(await heads.token(row)), 1)
    return row


def round_of(
    sessions: Sequence[ChainSession], heads: HeadBatch, rows: list[bytes], tokens: int
) -> Callable[[], Awaitable[float]]:
    """Tokens/s of all sessions from a prompt's length on; `rows` are the prompts' last."""

    async def measure() -> float:
        for session in sessions:
            session.truncate(PROMPT)
        settled = await asyncio.gather(
            *(decode(one, heads, row, SETTLE) for one, row in zip(sessions, rows, strict=True))
        )
        heads.batch.num_calls = heads.batch.num_rows = 0
        started = time.perf_counter()
        await asyncio.gather(
            *(decode(one, heads, row, tokens) for one, row in zip(sessions, settled, strict=True))
        )
        return len(sessions) * tokens / (time.perf_counter() - started)

    return measure


async def measured(
    shape: str, servers: Sequence[Server], tokens: int, wanted: int
) -> tuple[dict[int, Rounds], dict[int, float]]:
    """Rounds by number of sessions, and how many rows the head had at once in the last one."""
    head = load_head(saved_source(shape), dtype="bfloat16")
    workers = {**workers_of(servers), "client": os.getpid()}
    ways: dict[str, Way] = {}
    batches: dict[int, HeadBatch] = {}
    async with connected(shape, servers) as client, AsyncExitStack() as stack:
        for count in SESSIONS:
            sessions = [
                await stack.enter_async_context(await client.open_session("bfloat16"))
                for _ in range(count)
            ]
            rows = [await one.step(random_rows(shape, PROMPT), PROMPT) for one in sessions]
            heads = batches[count] = HeadBatch(head, "bfloat16")
            measure = round_of(sessions, heads, rows, tokens)
            ways[str(count)] = Way(workers=workers, measure=measure)
        rounds = await take_rounds(ways, wanted)
    return (
        {int(name): taken for name, taken in rounds.items()},
        {count: one.batch.num_rows / one.batch.num_calls for count, one in batches.items()},
    )


def main() -> None:
    """Tokens/s by number of sessions, beside one session."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape only, 1 round")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--rounds", type=int, default=4, help="that count")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    rows: list[dict[str, object]] = []
    details: dict[str, Any] = {}
    for shape in ("small",) if options.quick else ("small", "1.1b"):
        with running(shape, 2) as servers:
            tokens, wanted = (64, 1) if options.quick else (24 if shape == "1.1b" else 128, 0)
            rounds, rows_per_head = asyncio.run(
                measured(shape, servers, tokens, wanted or options.rounds)
            )
        for count, taken in rounds.items():
            speed = taken.median
            rows.append(
                {"shape": shape, "sessions": count, "tokens_per_s": speed,
                 "per_session": None if speed is None else speed / count,
                 "gain": taken.over(rounds[1]), "rows_per_head": rows_per_head[count],
                 **taken.cells()}
            )  # fmt: skip
            details[f"{shape}, {count} sessions"] = taken.details()
    publish("batching", rows, facts, details)


if __name__ == "__main__":
    main()
