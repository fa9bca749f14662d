"""What does one client's flood cost the answer of another client?

Two servers; the reader decodes one session. Beside it, another client decodes 20 sessions, or
sends 4 prompts of 512 rows one after the other, or both: about ten times the load. The figure
is the reader's tokens/s; alone is the baseline. bfloat16, no head.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from model_servers import Server, connected, random_rows, running, workers_of
from random_model import SHAPES
from report import RESULTS, environment, publish
from rounds import Way, take_rounds
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client

FLOODS = {"alone": (0, 0), "20 chats": (20, 0), "4 prompts": (0, 4), "both": (20, 4)}
PROMPT = 512
WARM_UP_S = 3.0
SETTLE = 2
ROUND_S = 6.0
"""So long a round's clock runs at most, but for the first few tokens: beside a flood of the
large shape a token takes more than a second."""

TOKENS_MIN = 4
LENGTH_MAX = 2048


async def chatter(session: ChainSession, shape: str) -> None:
    """Decode for ever."""
    row = random_rows(shape, 1)
    while True:
        await session.step(row, 1)
        if session.length >= LENGTH_MAX:
            session.truncate(0)


async def stuffer(session: ChainSession, shape: str) -> None:
    """Prompts for ever."""
    prompt = random_rows(shape, PROMPT)
    while True:
        await session.step(prompt, PROMPT)
        session.truncate(0)


def beside(
    reader: ChainSession, greedy: Client, shape: str, flood: tuple[int, int], tokens: int
) -> Callable[[], Awaitable[float]]:
    """The reader's tokens/s, of `tokens` at most, beside so many chats and prompts of `greedy`."""

    async def measure() -> float:
        chats, prompts = flood
        sessions = [await greedy.open_session("bfloat16") for _ in range(chats + prompts)]
        work = [
            *(asyncio.ensure_future(chatter(one, shape)) for one in sessions[:chats]),
            *(asyncio.ensure_future(stuffer(one, shape)) for one in sessions[chats:]),
        ]
        try:
            row = random_rows(shape, 1)
            if work:
                await asyncio.sleep(WARM_UP_S)
            reader.truncate(64)
            for _ in range(SETTLE):
                await reader.step(row, 1)
            started, count, took_s = time.perf_counter(), 0, 0.0
            while count < tokens and (count < TOKENS_MIN or took_s < ROUND_S):
                await reader.step(row, 1)
                count, took_s = count + 1, time.perf_counter() - started
            return count / took_s
        finally:
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            for session in sessions:
                session.close()

    return measure


async def measured(
    shape: str, servers: Sequence[Server], tokens: int, wanted: int
) -> dict[str, Any]:
    """Rounds by flood."""
    workers = {**workers_of(servers), "client": os.getpid()}
    async with (
        connected(shape, servers) as client,
        connected(shape, servers) as greedy,
        await client.open_session("bfloat16") as reader,
    ):
        await reader.step(random_rows(shape, 64), 64)
        ways = {
            name: Way(workers=workers, measure=beside(reader, greedy, shape, flood, tokens))
            for name, flood in FLOODS.items()
        }
        return dict(await take_rounds(ways, wanted))


def main() -> None:
    """The reader's tokens/s by what else is asked of the servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape only, 1 round")
    parser.add_argument("--rounds", type=int, default=2, help="that count")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--shapes", nargs="+", default=["110m", "1.1b"], choices=list(SHAPES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    rows: list[dict[str, object]] = []
    for shape in ("small",) if options.quick else options.shapes:
        with running(shape, 2) as servers:
            tokens = 24 if shape == "1.1b" else 100
            taken = asyncio.run(
                measured(shape, servers, tokens, 1 if options.quick else options.rounds)
            )
        for name, rounds in taken.items():
            rows.append(
                {"shape": shape, "beside": name, "tokens_per_s": rounds.median,
                 "share_of_alone": rounds.over(taken["alone"]), **rounds.cells()}
            )  # fmt: skip
    publish("overload", rows, facts, None, options.out)


if __name__ == "__main__":
    main()
