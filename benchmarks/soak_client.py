"""The client processes of soak.py: answers without end, each compared with its reference.

Forked by `recovery_spawner.py`; `main` takes one JSON text. SIGTERM: finish the answers
that have begun, then end. One line of JSON per answer goes to a file at once, so that a
client that is killed leaves what it had.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import torch

from recovery_client import Setting, load_setting
from shoal.base.errors import PeerUnreachable, ShoalError
from shoal.cli.joining import SwarmChoice, visit, wall_clock
from shoal.cli.logs import configure_logging
from shoal.cli.models import open_model
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.client.tending import TendConfig
from shoal.hf.generation import generate
from shoal.hf.sampling import Sampler
from shoal.wire.messages import WANT_ALL

ANSWERS_PER_CLIENT: Final = 20
"""Then the client leaves and another one, under another identity, comes."""

GUESS_EVERY: Final = 7
"""Tokens between two wrong guesses, for answers that guess."""

GUESSES: Final = 3
JOIN_AGAIN_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One answer to be given."""

    number: int
    prompt_start: int
    """Where in the fixed text its prompt begins, in tokens."""
    prompt_tokens: int
    new_tokens: int
    temperature: float
    seed: int
    guesses: bool
    """Whether wrong tokens are sent and taken back now and then, as in speculative decoding."""


@dataclass(slots=True)
class Timing:
    """When the tokens of one answer came."""

    started_s: float
    last_s: float
    first_s: float = 0.0
    """Time to the first token."""
    longest_s: float = 0.0
    """Between two tokens."""
    longest_at_s: float = 0.0
    """Monotonic time at which that pause began."""

    def token(self) -> None:
        """Another one is here."""
        now_s = time.monotonic()
        if self.first_s:
            if now_s - self.last_s > self.longest_s:
                self.longest_s, self.longest_at_s = now_s - self.last_s, self.last_s
        else:
            self.first_s = now_s - self.started_s
        self.last_s = now_s


async def answer(
    session: ChainSession, setting: Setting, work: Work, timing: Timing, ids: list[int]
) -> None:
    """Put the tokens of the answer into `ids` as they come."""
    prompt = setting.prompt(work.prompt_start + work.prompt_tokens)[work.prompt_start :]
    sampler = Sampler(temperature=work.temperature, seed=work.seed)
    tokens = generate(
        session, setting.head, prompt, max_new_tokens=work.new_tokens, sampler=sampler
    )
    async for token in tokens:
        timing.token()
        ids.append(token.id)
        if work.guesses and len(ids) % GUESS_EVERY == 0:
            await _guess_wrong(session, setting, len(ids))


async def _guess_wrong(session: ChainSession, setting: Setting, salt: int) -> None:
    """Send some tokens and take them back: every other time before their rows are here."""
    start = session.length
    wrong = [(salt * 31 + index) % setting.head.vocab_size for index in range(GUESSES)]
    rows = setting.head.embed(wrong, session.encoding, start)
    session.append(rows, GUESSES, want=WANT_ALL)
    if salt // GUESS_EVERY % 2:
        await session.rows(start, start + GUESSES)
    session.truncate(start)


class Clients:
    """One process: clients one after the other, several answers at a time."""

    def __init__(self, plan: Mapping[str, Any], setting: Setting, out: TextIO) -> None:
        self._setting = setting
        self._out = out
        self._references: list[list[int]] = plan["references"]
        works = [Work(**one) for one in plan["works"]]
        random.Random(plan["seed"]).shuffle(works)
        self._works: Iterator[Work] = itertools.cycle(works)
        self._concurrency: int = plan["concurrency"]
        self._standby: int = plan["standby"]
        self._swarm = SwarmChoice.parse(plan["joins"], None, None)
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stopping.set)
        while not self._stopping.is_set():
            try:
                await self._one_client()
            except PeerUnreachable as error:  # all servers that we know were down just now
                self._write({"work": None, "error": "joining", "detail": str(error)})
                await asyncio.sleep(JOIN_AGAIN_S)

    async def _one_client(self) -> None:
        model = self._setting.model
        config = ClientConfig(
            model=model.name, num_blocks=model.num_blocks, hidden_size=model.hidden_size,
            tending=TendConfig(standby=self._standby),
        )  # fmt: skip
        async with (
            visit(self._swarm) as visitor,
            open_client(
                visitor.identity, visitor.transport, visitor.swarm_pass, visitor.directory, config,
                rng=random.SystemRandom(), wall_clock=wall_clock,
            ) as client,
        ):  # fmt: skip
            left = iter(range(ANSWERS_PER_CLIENT))
            await asyncio.gather(*(self._answers(client, left) for _ in range(self._concurrency)))

    async def _answers(self, client: Client, left: Iterator[int]) -> None:
        for _ in left:
            if self._stopping.is_set():
                return
            await self._one_answer(client, next(self._works))

    async def _one_answer(self, client: Client, work: Work) -> None:
        now_s = time.monotonic()
        timing, ids = Timing(started_s=now_s, last_s=now_s), list[int]()
        said: dict[str, Any] = {"work": work.number, "error": None, "detail": ""}
        recoveries, moves, numerics = 0, 0, ""
        try:
            async with await client.open_session(self._setting.dtype) as session:
                try:
                    await answer(session, self._setting, work, timing, ids)
                finally:
                    recoveries, moves = len(session.recoveries), len(session.moves)
                    numerics = session.numerics
        except ShoalError as error:
            said |= {"error": type(error).__name__, "detail": str(error)[:300]}
        expected = self._references[work.number]
        pairs = enumerate(zip(ids, expected, strict=False))
        same = next(
            (at for at, (mine, theirs) in pairs if mine != theirs), min(len(ids), len(expected))
        )
        self._write(
            said
            | {
                "tokens": len(ids), "expected": len(expected), "same": same,
                "first_s": round(timing.first_s, 3), "longest_s": round(timing.longest_s, 3),
                "longest_at_s": round(timing.longest_at_s, 3),
                "seconds": round(time.monotonic() - timing.started_s, 3),
                "recoveries": recoveries, "moves": moves, "numerics": numerics,
            }
        )  # fmt: skip

    def _write(self, said: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(dict(said) | {"at_s": round(time.monotonic(), 3)}) + "\n")
        self._out.flush()


def plan_text(
    *, model: str, dtype: str, stages: int, joins: Sequence[str], works: Sequence[Work],
    references: Sequence[Sequence[int]], output: Path, seed: int, concurrency: int, standby: int,
) -> str:  # fmt: skip
    """What `main` wants to know."""
    return json.dumps(
        {
            "model": model, "dtype": dtype, "stages": stages, "joins": list(joins),
            "works": [asdict(work) for work in works], "references": list(map(list, references)),
            "output": str(output), "seed": seed, "concurrency": concurrency, "standby": standby,
        }
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Answer until SIGTERM."""
    plan = json.loads(arguments[0])
    torch.set_num_threads(1)
    configure_logging("info")
    setting = load_setting(open_model(plan["model"]), plan["dtype"], plan["stages"])
    with Path(plan["output"]).open("a", encoding="utf-8") as out:

        async def run() -> None:
            await Clients(plan, setting, out).run()

        asyncio.run(run())
    return 0
