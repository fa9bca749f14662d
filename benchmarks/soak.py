"""Answers under continuous kills, for as long as asked: does every text stay what it was?

Real `shoal serve` processes, three spans with two servers each, and client processes with
several answers at a time, one of them with standbys: greedy and seeded, with wrong guesses
taken back, after short and long prompts. Meanwhile servers are killed (kill -9), asked to
leave (SIGTERM) and stopped for a while (SIGSTOP, SIGCONT), sometimes all of a span at once,
and start again as the same peer; a client is killed now and then too. Every answer is
compared with the one that the undisturbed swarm gave. At the end all clients go, one without
a farewell, and the servers must hold nothing any more. Ctrl-C ends it early and gives the
table so far.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from recovery_client import Setting, joined, load_setting
from recovery_servers import Child, Fleet, exists, fleet, send_signal, wait_gone
from report import environment, publish
from shoal.cli.models import open_model
from soak_chaos import Chaos, Losses
from soak_client import Timing, Work, answer, plan_text
from soak_report import Soak, read_answers, rows
from tiny_model import save_tiny

REAL: Final = "smollm2-135m-instruct"
STAGES: Final = 3
REPLICAS: Final = 2
SPARED: Final = "stage1-0"
STANDING_BY: Final = "client1"
"""The client whose answers have a standby."""

DRAIN_S: Final = 15
"""A server that is asked to leave waits this long for its sessions to move."""

CONCURRENT_REFERENCES: Final = 4
SAMPLE_S: Final = 10.0
FINISH_S_MAX: Final = 150.0
"""For answers that have begun when the kills end: twice a client's patience, and some."""

FAULTY: Final = r"Traceback|engine broke|repair broke|batch failed|InternalError"
"""What no log may say."""


def works(rng: random.Random, count: int, prompt_max: int) -> list[Work]:
    """Answers of all kinds."""
    return [
        Work(
            number=number,
            prompt_start=rng.randrange(200),
            prompt_tokens=rng.choice((4, 16, 64, 150, prompt_max)),
            new_tokens=rng.randrange(24, 120),
            temperature=rng.choice((0.0, 0.0, 0.8)),
            seed=rng.randrange(1 << 30),
            guesses=number % 3 == 0,
        )
        for number in range(count)
    ]


async def references(servers: Fleet, setting: Setting, asked: list[Work]) -> list[list[int]]:
    """What the undisturbed swarm answers.

    Raises:
        SystemExit: it was disturbed.
    """
    found: list[list[int]] = [[] for _ in asked]
    left = iter(asked)
    async with joined(servers, setting) as client:

        async def some() -> None:
            for work in left:
                async with await client.open_session(setting.dtype) as session:
                    timing = Timing(started_s=0.0, last_s=0.0)
                    await answer(session, setting, work, timing, found[work.number])
                    if session.recoveries:
                        raise SystemExit("a repair in a reference: is the machine too full?")

        await asyncio.gather(*(some() for _ in range(CONCURRENT_REFERENCES)))
    return found


@dataclass(slots=True)
class Soaking:
    """One run."""

    options: argparse.Namespace
    servers: Fleet
    setting: Setting
    folder: Path
    model: str
    soak: Soak = field(default_factory=Soak)
    chaos: Chaos | None = None
    clients: dict[str, Child] = field(default_factory=dict)
    outputs: list[Path] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)

    async def run(self) -> None:
        """Start, kill, end."""
        rng = random.Random(self.options.seed)
        for stage, span in enumerate(self.setting.spans):
            for replica in range(REPLICAS):
                await self.servers.start(f"stage{stage}-{replica}", f"{span.start}:{span.end}")
        asked = works(rng, self.options.works, self.options.prompt_max)
        self._say(f"{len(asked)} references")
        found = await references(self.servers, self.setting, asked)
        self.plan = {"works": asked, "references": found}
        self.chaos = Chaos(
            self.servers, rng, self.options.interval, SPARED, lambda: self._kill_client("client0")
        )
        await self.soak.settle(self.servers, {})
        before = self.soak.left
        if self.soak.leaks:
            raise SystemExit(f"before anything was killed: {self.soak.leaks}")
        self.soak.is_settled = False
        for index in range(self.options.clients):
            await self._start_client(f"client{index}")
        watching = asyncio.create_task(self._watch())
        try:
            await self.chaos.run(time.monotonic() + 60 * self.options.minutes)
            await self._end_clients()
        finally:
            watching.cancel()
        await self.soak.settle(self.servers, before)

    async def _start_client(self, name: str) -> None:
        output = self.folder / f"answers-{len(self.outputs)}.jsonl"
        output.touch()
        self.outputs.append(output)
        plan = plan_text(
            model=self.model, dtype=self.options.dtype, stages=STAGES, joins=self.servers.joins,
            output=output, seed=len(self.outputs), concurrency=self.options.concurrency,
            standby=int(name == STANDING_BY), **self.plan,
        )  # fmt: skip
        self.clients[name] = await self.servers.fork(name, "soak_client:main", [plan])

    async def _kill_client(self, name: str) -> None:
        send_signal(self.clients[name].pid, signal.SIGKILL)
        await self._start_client(name)

    async def _end_clients(self) -> None:
        """They finish what they began; the last one is killed, in the middle of its answers."""
        *leaving, vanishing = self.clients.values()
        send_signal(vanishing.pid, signal.SIGKILL)
        for client in leaving:
            send_signal(client.pid, signal.SIGTERM)
        await asyncio.gather(*(wait_gone(client.pid, FINISH_S_MAX) for client in leaving))
        for name, client in self.clients.items():
            if exists(client.pid):
                self.soak.faults.append(f"{name} did not finish within {FINISH_S_MAX:.0f} s")
                send_signal(client.pid, signal.SIGKILL)

    async def _watch(self) -> None:
        """Sample, show progress, and see that clients live."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            await self.soak.sample(self.servers)
            for name, client in self.clients.items():
                if not exists(client.pid) and "Traceback" in client.said():
                    self.soak.faults.append(f"{name} ended: {client.said()[-500:]}")
            answers = read_answers(self.outputs)
            errors = sum(1 for one in answers if one["error"])
            kills = self.chaos.losses.num_kills if self.chaos else 0
            seconds = time.monotonic() - self.soak.started_s
            self._say(f"{seconds:.0f} s, {kills} kills, {len(answers)} answers, {errors} errors")

    def _say(self, what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    def publish(self, facts: dict[str, Any]) -> None:
        """What was found so far."""
        answers = read_answers(self.outputs)
        losses = self.chaos.losses if self.chaos else Losses()
        faults = [*self.soak.faults, *losses.faults]
        faults += sorted(set(self.servers.said(FAULTY)))[:20]
        spans = [
            [f"stage{stage}-{replica}" for replica in range(REPLICAS)] for stage in range(STAGES)
        ]
        minutes = round((time.monotonic() - self.soak.started_s) / 60, 1)
        table: list[dict[str, Any]] = [
            {"what": "model, dtype", "figure": f"{self.options.name}, {self.options.dtype}"},
            {"what": "minutes, with references and end", "figure": minutes},
            *rows(self.soak, answers, losses, faults, SPARED, spans),
        ]
        details = {
            "losses": losses.log,
            "away": losses.away,
            "leave_s": losses.leave_s,
            "samples": self.soak.samples,
            "left": self.soak.left,
            "memory_in_use_mb": self.soak.released_mb,
            "not_equal": [
                one for one in answers
                if one["error"] or not one["same"] == one["tokens"] == one["expected"]
            ],
            "works": [str(work) for work in self.plan.get("works", ())],
        }  # fmt: skip
        publish("soak", table, facts, details)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of kills")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 15 s")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--model", default=REAL, help="or `tiny`: random weights, 6 blocks")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=1, help="of victims, moments and answers")
    parser.add_argument("--interval", type=float, default=3.5, help="mean seconds between losses")
    parser.add_argument("--clients", type=int, default=3, help="processes")
    parser.add_argument("--concurrency", type=int, default=3, help="answers at a time in each")
    parser.add_argument("--works", type=int, default=24, help="different answers")
    parser.add_argument("--prompt-max", type=int, default=400, help="tokens of the longest prompt")
    parser.add_argument("--keep", metavar="FOLDER", help="keep logs and answers there")
    options = parser.parse_args()
    if options.quick:
        options.model, options.minutes, options.works, options.interval = "tiny", 0.25, 6, 2.0
    options.name = options.model
    return options


def main() -> None:
    """The demo model, or another."""
    options = parse()
    torch.set_num_threads(1)
    facts = environment()
    with tempfile.TemporaryDirectory(prefix="shoal-") as temporary:
        folder = Path(options.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SystemExit(f"--keep {folder}: it must be empty")
        model = options.model
        if model == "tiny":
            model = str(folder / "model")
            save_tiny(Path(model))
        given = ("--dtype", options.dtype, "--drain", str(DRAIN_S))
        with fleet(folder, model, *given, programs=["soak_client"]) as servers:
            setting = load_setting(open_model(model), options.dtype, STAGES)
            soaking = Soaking(
                options=options, servers=servers, setting=setting, folder=folder, model=model
            )
            try:
                asyncio.run(soaking.run())
            except KeyboardInterrupt:
                print("interrupted: the table so far", file=sys.stderr)
            finally:
                soaking.publish(facts)


if __name__ == "__main__":
    main()
