"""What do logs and signs of life cost while nothing fails?

Decoding through three real `shoal serve` processes, round by round in turns: as it is; by a
client that never pings; and by such a client with servers that forget rows once they are
sent. Differences of rounds are small beside their noise, so the same is also counted piece
by piece: core time per ping, and time per row in the log of one hop.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from recovery_client import Decoding, Setting, joined, load_setting
from recovery_servers import Fleet, Member, fleet
from report import environment, publish
from rounds import Rounds, Way, read_accounts, take_rounds
from shoal.base.ids import SessionId, parse_peer
from shoal.base.limits import ALIVE_PERIOD_S, WINDOW_BYTES
from shoal.cli.models import open_model
from shoal.client.client import Client
from shoal.link.log import Log, LogEntry
from shoal.link.outbound import Outbound
from shoal.wire.messages import WANT_LAST, Ping
from tiny_model import save_tiny

REAL: Final = "smollm2-135m-instruct"
STAGES: Final = 3
PROMPT: Final = 64
WARM_UP: Final = 8
TOKENS: Final = {"tiny": 300, REAL: 32}
"""Of one round: a second or two. A round that was disturbed is taken anew, up to three times,
so the whole must be short to end within minutes on a busy machine as well."""

PINGS: Final = 500
ENTRIES: Final = 20_000
GOAL: Final = 0.02

USUAL: Final = "as it is"
NO_PINGS: Final = "without pings"
NOTHING: Final = "without pings and logs"


class Unwatchful(Client):
    """A client that never asks for a sign of life."""

    def start(self) -> None:
        """Nothing is watched."""


def decoding(
    client: Client, setting: Setting, members: Sequence[Member], tokens: int, order: str
) -> Callable[[], Awaitable[float]]:
    """A round: one answer's tokens/s, the servers' logs as `order` says."""

    async def measure() -> float:
        for member in members:
            await member.order(order)
        async with await client.open_session(setting.dtype) as session:
            answer = Decoding(session, setting)
            await answer.prefill(setting.prompt(PROMPT))
            for _ in range(WARM_UP):
                await answer.step()
            started_s = time.monotonic()
            for _ in range(tokens):
                await answer.step()
            return tokens / (time.monotonic() - started_s)

    return measure


async def ping_s(client: Client, members: Sequence[Member]) -> float:
    """Core seconds of one ping, both sides together."""
    spent = []
    for member in members:
        link = client.link(parse_peer(member.peer))
        await link.connect(rows=False)
        before = read_accounts()
        for _ in range(PINGS):
            await link.request(Ping)
        after = read_accounts()
        if before is None or after is None:
            raise SystemExit("this system keeps no accounts of threads")
        pids = (os.getpid(), member.pid)
        spent += [
            sum(after.processes[pid].since(before.processes[pid]).ran_s for pid in pids) / PINGS
        ]
    return median(spent)


def log_s(row: bytes) -> float:
    """Seconds that one decoded row takes in the log of a hop: in, and out by the cursor."""
    log = Log()
    outbound = Outbound(SessionId(bytes(32)), 0, log)
    outbound.on_have(0, 0, 0, WINDOW_BYTES, 0)
    started_s = time.perf_counter()
    for position in range(ENTRIES):
        log.append(
            LogEntry(
                position=position, count=1, call_count=1, want=WANT_LAST, encoding="float32",
                num_rows=1, payload=row, payload_bytes=len(row),
            )
        )  # fmt: skip
        outbound.next_entry()
        outbound.on_ack(0, 0, position + 1)
    return (time.perf_counter() - started_s) / ENTRIES


async def measured(
    servers: Fleet, setting: Setting, tokens: int, wanted: int
) -> tuple[dict[str, Rounds], float]:
    """Rounds by way, and core seconds per ping."""
    members = [
        await servers.start(f"stage{stage}", f"{span.start}:{span.end}")
        for stage, span in enumerate(setting.spans)
    ]
    workers = {"client": os.getpid(), **{member.name: member.pid for member in members}}
    async with (
        joined(servers, setting) as client,
        joined(servers, setting, kind=Unwatchful) as unwatchful,
    ):
        ways = {
            USUAL: (client, "keep logs"),
            NO_PINGS: (unwatchful, "keep logs"),
            NOTHING: (unwatchful, "trim logs"),
        }
        taken = await take_rounds(
            {
                name: Way(workers=workers, measure=decoding(who, setting, members, tokens, order))
                for name, (who, order) in ways.items()
            },
            wanted,
        )
        return dict(taken), await ping_s(client, members)


def rows(
    name: str, setting: Setting, taken: dict[str, Rounds], ping: float
) -> list[dict[str, Any]]:
    """Rounds, and the same counted."""
    found: list[dict[str, Any]] = []
    for way, rounds in taken.items():
        saved = rounds.over(taken[USUAL])
        found.append(
            {"model": name, "what": way, "tokens_per_s": rounds.median,
             "share_of_decode": None if saved is None else saved - 1, **rounds.cells()}
        )  # fmt: skip
    speed = taken[USUAL].median or median(one.value for one in taken[USUAL].taken)
    row = bytes(setting.model.hidden_size * 4)
    pings_per_s = len(setting.spans) / ALIVE_PERIOD_S
    counted = {
        f"counted: {pings_per_s:.0f} pings/s of {1e6 * ping:.0f} us": pings_per_s * ping,
        f"counted: {len(setting.spans) + 1} logs, {1e6 * log_s(row):.1f} us per row": log_s(row)
        * (len(setting.spans) + 1)
        * speed,
    }
    for what, share in counted.items():
        found.append(
            {"model": name, "what": what, "tokens_per_s": "-", "share_of_decode": share,
             "rounds": "-", "dropped": "-"}
        )  # fmt: skip
    total = sum(counted.values())
    found.append(
        {"model": name, "what": f"counted, together (goal {GOAL})", "tokens_per_s": "-",
         "share_of_decode": total, "rounds": "-", "dropped": "-"}
    )  # fmt: skip
    return found


def main() -> None:
    """The tiny model, which shows overhead most, and the demo model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the tiny model only, 1 round")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument(
        "--rounds", type=int, default=4, help="that count, of every way; the demo model takes half"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    table: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for name in ("tiny",) if options.quick else ("tiny", REAL):
        with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
            model = name
            if name == "tiny":
                model = str(Path(folder, "model"))
                save_tiny(Path(model))
            with fleet(Path(folder), model) as servers:
                setting = load_setting(open_model(model), "float32", STAGES)
                wanted = 1 if options.quick else options.rounds
                if name == REAL:
                    wanted = max(1, wanted // 2)
                taken, ping = asyncio.run(measured(servers, setting, TOKENS[name], wanted))
        table += rows(name, setting, taken, ping)
        details |= {f"{name}, {way}": rounds.details() for way, rounds in taken.items()}
    publish("recovery-cost", table, facts, details)


if __name__ == "__main__":
    main()
