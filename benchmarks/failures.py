"""Steps/s when every step may meet a failure: restarts, no cache, Petals' Algorithm 1, ours.

The experiment of Petals' paper (arXiv 2312.08361, table 1) on our engine: generate 128 and
1,024 tokens while a server of the chain loses a session's state and links with probability
1e-4, 1e-3 or 1e-2 per step. Real `shoal serve` processes, three spans, the middle one three
times; a loss is an order to the middle server of the moment, which stays up. Runs are real
at 0 and 1e-2; the table is computed from their parts over many seeded runs, with the same
failing steps for all methods. METHODOLOGY.md says how.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from failures_model import Method, Parts, mean_steps_per_s
from recovery_client import Decoding, Setting, joined, load_setting
from recovery_servers import Fleet, fleet
from report import environment, publish
from shoal.base.ids import peer_text
from shoal.cli.models import open_model
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client
from shoal.wire.messages import WANT_ALL, WANT_LAST
from tiny_model import save_tiny

REAL: Final = "smollm2-135m-instruct"
STAGES: Final = 3
VICTIM: Final = 1
MIDDLE_SERVERS: Final = 3
PROMPT: Final = 16
RATES: Final = (0.0, 1e-4, 1e-3, 1e-2)
RUN_RATE: Final = 1e-2
AFTERMATH: Final = 32
"""Steps after a loss that may still be slower, while a new standby catches up."""

NO_CACHE_AT: Final = 8
"""Lengths at which a computation of everything is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One real generation."""

    step_s: list[float]
    ids: list[int]
    lost_at: tuple[int, ...]

    def steps_per_s(self, count: int) -> float:
        """Over its first `count` steps."""
        return count / sum(self.step_s[:count])


async def run_ours(
    servers: Fleet, setting: Setting, steps: int, lost_at: Iterable[int], standby: int
) -> Run:
    """Generate; before the steps `lost_at` the middle server loses everything."""
    lost_at = tuple(lost_at)
    times = []
    async with (
        joined(servers, setting, standby=standby) as client,
        await client.open_session(setting.dtype) as session,
    ):
        decoding = Decoding(session, setting)
        await decoding.prefill(setting.prompt(PROMPT))
        for index in range(steps):
            started_s = time.monotonic()
            if index in lost_at:
                await servers.named(peer_text(session.chain[VICTIM].peer)).order("drop")
            await decoding.step()
            times.append(time.monotonic() - started_s)
    return Run(step_s=times, ids=decoding.ids, lost_at=lost_at)


class ClientLogs:
    """Petals' Algorithm 1: the client calls one server after the other and keeps what it sent.

    A server that lost its cache is replaced by sending its replacement everything the lost
    one was sent, as one prompt. The loss is known at once: no time is charged for noticing.
    """

    def __init__(self, client: Client, setting: Setting) -> None:
        self._client = client
        self._setting = setting
        self._stages: list[ChainSession] = []
        self._logs = [bytearray() for _ in setting.spans]
        self.ids: list[int] = []

    async def start(self, prompt: list[int]) -> None:
        """Open a stream to a server of each span; run the prompt."""
        for span in self._setting.spans:
            self._stages.append(await self._client.open_session(self._setting.dtype, span))
        await self._advance(prompt)

    async def step(self, is_lost: bool) -> None:
        """One more token."""
        await self._advance(self.ids[-1:], lost_stage=VICTIM if is_lost else None)

    async def _advance(self, ids: list[int], lost_stage: int | None = None) -> None:
        encoding = self._setting.dtype
        position = len(self.ids) - (1 if self.ids else 0)
        rows = self._setting.head.embed(ids, encoding, position)
        for index, log in enumerate(self._logs):
            log += rows
            if index == lost_stage:
                rows = await self._replace(index, position + len(ids))
            else:
                rows = await self._stages[index].step(rows, len(ids), want=WANT_ALL)
        scores = self._setting.head.logits(rows, encoding)[-1]
        self.ids += [*(() if self.ids else ids), int(scores.argmax())]

    async def _replace(self, index: int, length: int) -> bytes:
        self._stages[index].close()
        span = self._setting.spans[index]
        self._stages[index] = await self._client.open_session(self._setting.dtype, span)
        return await self._stages[index].step(bytes(self._logs[index]), length, want=WANT_LAST)

    def close(self) -> None:
        """End the streams."""
        for stage in self._stages:
            stage.close()


async def run_petals(servers: Fleet, setting: Setting, steps: int, lost_at: Iterable[int]) -> Run:
    """The same generation with Algorithm 1."""
    lost_at = tuple(lost_at)
    times = []
    async with joined(servers, setting) as client:
        logs = ClientLogs(client, setting)
        await logs.start(setting.prompt(PROMPT))
        for index in range(steps):
            started_s = time.monotonic()
            await logs.step(index in lost_at)
            times.append(time.monotonic() - started_s)
        logs.close()
    return Run(step_s=times, ids=logs.ids, lost_at=lost_at)


async def whole_prompts(
    servers: Fleet, setting: Setting, ids: list[int]
) -> list[tuple[int, float]]:
    """(tokens, seconds) for computing everything so far as one prompt, in a new session."""
    lengths = sorted(
        {max(PROMPT, len(ids) * part // NO_CACHE_AT) for part in range(NO_CACHE_AT + 1)}
    )
    found = []
    async with joined(servers, setting) as client:
        for length in (lengths[-1], *lengths):  # the first warms up
            started_s = time.monotonic()
            async with await client.open_session(setting.dtype) as session:
                await Decoding(session, setting).prefill(ids[:length])
            found.append((length, time.monotonic() - started_s))
    return found[1:]


def seeded_losses(seed: int, steps: int, rate: float) -> list[int]:
    """The steps that meet a failure."""
    rng = random.Random(f"{seed} run")
    return [index for index in range(steps) if rng.random() < rate]


class Measuring:
    """All methods, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.runs: dict[str, Run] = {}
        self.whole: list[tuple[int, float]] = []

    async def run(self, servers: Fleet, setting: Setting) -> None:
        """Every real run."""
        for stage, span in enumerate(setting.spans):
            for replica in range(MIDDLE_SERVERS if stage == VICTIM else 1):
                await servers.start(f"stage{stage}-{replica}", f"{span.start}:{span.end}")
        steps = max(self.options.tokens)
        lost_at = seeded_losses(self.options.seed, steps, RUN_RATE)
        await run_ours(servers, setting, min(32, steps), (), 0)  # warms up
        for standby in (0, 1):
            for name, losses in (("0", ()), ("1e-2", lost_at)):
                run = await run_ours(servers, setting, steps, losses, standby)
                self.runs[f"ours, standby {standby}, {name}"] = run
        self.runs["petals, 1e-2"] = await run_petals(servers, setting, steps, lost_at)
        self.whole = await whole_prompts(servers, setting, self.runs["ours, standby 0, 0"].ids)

    def methods(self) -> list[Method]:
        """What the runs say about each way."""
        free = self.runs["ours, standby 0, 0"]
        petals = self.runs["petals, 1e-2"]
        found = [
            Method(name="restart", parts=Parts.of(free.step_s), restarts=True),
            Method(name="no cache", parts=Parts.of_whole(self.whole, PROMPT, len(free.step_s))),
            Method(
                name="Petals' Algorithm 1", run=petals.step_s,
                parts=Parts.of_run(petals.step_s, petals.lost_at, aftermath=1),
            ),
        ]  # fmt: skip
        for standby in (0, 1):
            run = self.runs[f"ours, standby {standby}, 1e-2"]
            base = self.runs[f"ours, standby {standby}, 0"].step_s
            aftermath = AFTERMATH if standby else 1
            parts = Parts.of_run(run.step_s, run.lost_at, aftermath=aftermath, base=base)
            name = "ours, with a standby" if standby else "ours"
            found.append(Method(name=name, parts=parts, run=run.step_s))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """The table."""
        free = self.runs["ours, standby 0, 0"]
        found = []
        for tokens in self.options.tokens:
            for method in self.methods():
                row: dict[str, Any] = {"method": method.name, "tokens": tokens}
                for rate in RATES:
                    row[f"{rate:g}"] = mean_steps_per_s(method, tokens, rate, self.options.seed)
                row |= self._real(method, tokens, free)
                found.append(row)
        return found

    def _real(self, method: Method, tokens: int, free: Run) -> dict[str, Any]:
        """What its real run gave, beside its own speed and ours without failures."""
        if method.run is None:
            return dict.fromkeys(("run at 0.01", "losses", "of its own at 0", "of ours at 0"), "-")
        lost_at = self.runs["ours, standby 0, 1e-2"].lost_at
        rate = tokens / sum(method.run[:tokens])
        return {
            "run at 0.01": rate,
            "losses": sum(1 for at in lost_at if at < tokens),
            "of its own at 0": rate * sum(method.parts.step_s[:tokens]) / tokens,
            "of ours at 0": rate / free.steps_per_s(tokens),
        }

    def details(self) -> dict[str, Any]:
        """Every step, for the JSON."""
        ids = self.runs["ours, standby 0, 0"].ids
        return {
            "same_text": {name: run.ids == ids for name, run in self.runs.items()},
            "lost_at": {name: run.lost_at for name, run in self.runs.items()},
            "step_s": {
                name: [round(one, 5) for one in run.step_s] for name, run in self.runs.items()
            },
            "whole_prompt_s": self.whole,
            "cost_of_a_loss_s": {m.name: m.parts.loss_line for m in self.methods()},
        }


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 32 and 128 tokens")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=1, help="of the failing steps")
    parser.add_argument(
        "--tokens", type=lambda text: [int(one) for one in text.split(",")],
        default=[128, 1024], metavar="N,N", help="to be generated",
    )  # fmt: skip
    options = parser.parse_args()
    if options.quick:
        options.tokens = [32, 128]
    return options


def main() -> None:
    """The demo model, or a tiny one."""
    options = parse()
    torch.set_num_threads(1)
    facts = environment()
    measuring = Measuring(options)
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        model = REAL
        if options.quick:
            model = str(Path(folder, "model"))
            save_tiny(Path(model))
        with fleet(Path(folder), model, "--dtype", options.dtype) as servers:
            setting = load_setting(open_model(model), options.dtype, STAGES)
            asyncio.run(measuring.run(servers, setting))
    theme = "failures" if options.dtype == "float32" else f"failures-{options.dtype}"
    publish(theme, measuring.rows(), facts, measuring.details())


if __name__ == "__main__":
    main()
