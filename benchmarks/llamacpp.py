"""How does a swarm of 1 or 2 servers compare with llama.cpp on the same bfloat16 weights?

One thread per process: llama.cpp's own server in one process (PyPI `xllamacpp`), beside 1
and 2 server processes and a client process that applies the head. Ways take turns. Decode:
tokens/s of 1 and of 8 sessions together; prefill: rows/s of a prompt of 512 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import torch

from gguf_model import saved_gguf
from head_batch import HeadBatch
from model_servers import Server, connected, running, workers_of
from random_model import SHAPES, saved_source
from report import environment, publish
from rounds import Rounds, Way, take_rounds
from shoal.client.client import Client
from shoal.hf.head import Head, load_head
from workers import Worker, working

LLAMACPP = "llama.cpp, 1 process"
SESSIONS = 8
PROMPT, LONG_PROMPT = 4, 512
"""Tokens: short ones where decode is measured, so that sessions begin together."""
TOKENS = 32
NAMED_TOKENS = 300
"""Lower ids are bytes or control the text in the GGUF file."""

Prompts = Sequence[Sequence[int]]


def prompts_of(shape: str, sessions: int, length: int) -> list[list[int]]:
    """The same random tokens for every way."""
    rng, size = random.Random(length), int(SHAPES[shape]["vocab_size"])
    return [[rng.randrange(NAMED_TOKENS, size) for _ in range(length)] for _ in range(sessions)]


class Texts:
    """The tokens that each way gave last, by figure."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, str], list[list[int]]] = {}

    def num_same(self, figure: str, way: str) -> str:
        """Tokens before the first that differs from llama.cpp's, over all sessions."""
        same = count = 0
        for mine, theirs in zip(
            self.tokens[figure, way], self.tokens[figure, LLAMACPP], strict=True
        ):
            pairs = enumerate(zip(mine, theirs, strict=False))
            same += next((at for at, (a, b) in pairs if a != b), len(mine))
            count += len(mine)
        return f"{same} of {count}"


async def session_rate(
    client: Client, heads: HeadBatch, prompt: Sequence[int], num_tokens: int
) -> tuple[float, float, list[int]]:
    """Prompt rows/s, decode tokens/s and the tokens of one session."""
    clock = time.perf_counter
    async with await client.open_session("bfloat16") as session:
        started = clock()
        row = await session.step(b"".join(heads.embed(token) for token in prompt), len(prompt))
        tokens = [await heads.token(row)]
        first = clock()
        while len(tokens) < num_tokens:
            row = await session.step(heads.embed(tokens[-1]), 1)
            tokens.append(await heads.token(row))
        last = clock()
    rate = (num_tokens - 1) / (last - first) if num_tokens > 1 else 0.0
    return len(prompt) / (first - started), rate, tokens


def through(
    client: Client, head: Head, prompts: Prompts, num_tokens: int, keep: Callable[[Any], None]
) -> Callable[[], Awaitable[float]]:
    """A round of a chain: all sessions at once."""

    async def measure() -> float:
        heads = HeadBatch(head, "bfloat16")
        results = await asyncio.gather(
            *(session_rate(client, heads, prompt, num_tokens) for prompt in prompts)
        )
        keep([tokens for _, _, tokens in results])
        if num_tokens == 1:
            return min(prompt_rate for prompt_rate, _, _ in results)
        return sum(rate for _, rate, _ in results)

    return measure


def asking(
    worker: Worker, prompts: Prompts, num_tokens: int, keep: Callable[[Any], None]
) -> Callable[[], Awaitable[float]]:
    """A round of llama.cpp."""

    async def measure() -> float:
        answer = await worker.ask({"prompts": prompts, "tokens": num_tokens})
        keep(answer["tokens"])
        return float(answer["prompt_per_s" if num_tokens == 1 else "decode_per_s"])

    return measure


async def measured(
    shape: str, worker: Worker, swarms: dict[str, list[Server]], wanted: int
) -> tuple[dict[tuple[str, str], Rounds], Texts]:
    """Rounds by figure and way."""
    head, texts = load_head(saved_source(shape), dtype="bfloat16"), Texts()
    figures = {
        "decode, 1 session": (prompts_of(shape, 1, PROMPT), TOKENS),
        f"decode, {SESSIONS} sessions": (prompts_of(shape, SESSIONS, PROMPT), TOKENS),
        f"prefill of {LONG_PROMPT}": (prompts_of(shape, 1, LONG_PROMPT), 1),
    }
    rounds: dict[tuple[str, str], Rounds] = {}
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(connected(shape, servers))
            for name, servers in swarms.items()
        }
        for figure, (prompts, num_tokens) in figures.items():

            def keeping(way: str, figure: str = figure) -> Callable[[Any], None]:
                return lambda tokens: texts.tokens.__setitem__((figure, way), tokens)

            ask = asking(worker, prompts, num_tokens, keeping(LLAMACPP))
            ways = {LLAMACPP: Way(workers={"process": worker.pid}, measure=ask)}
            for name, servers in swarms.items():
                workers = {**workers_of(servers), "client": os.getpid()}
                step = through(clients[name], head, prompts, num_tokens, keeping(name))
                ways[name] = Way(workers=workers, measure=step)
            taken = await take_rounds(ways, wanted)
            rounds |= {(figure, way): taken[way] for way in ways}
    return rounds, texts


def main() -> None:
    """One row per figure and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape, 1 round")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--rounds", type=int, default=3, help="that count, of every way")
    options = parser.parse_args()
    if importlib.util.find_spec("xllamacpp") is None:
        raise SystemExit("llama.cpp is not here: pip install xllamacpp, or this project's [bench]")
    torch.set_num_threads(1)
    shape = "small" if options.quick else "1.1b"
    facts = environment()
    with ExitStack() as stack:
        worker = stack.enter_context(
            working("llamacpp_worker.py", str(saved_gguf(shape)), str(SESSIONS), threads=1)
        )
        swarms = {
            "shoal, 1 server": stack.enter_context(running(shape, 1)),
            "shoal, 2 servers": stack.enter_context(running(shape, 2)),
        }
        rounds, texts = asyncio.run(
            measured(shape, worker, swarms, 1 if options.quick else options.rounds)
        )
    rows: list[dict[str, object]] = []
    details: dict[str, Any] = {}
    for (figure, way), taken in rounds.items():
        rows.append(
            {"shape": shape, "figure": figure, "way": way, "per_s": taken.median,
             "per_llamacpp": taken.over(rounds[figure, LLAMACPP]),
             "same_tokens": texts.num_same(figure, way), **taken.cells()}
        )  # fmt: skip
        details[f"{figure}, {way}"] = taken.details()
    publish("llamacpp", rows, facts, details)


if __name__ == "__main__":
    main()
