"""How long does an answer pause when a server dies, and what would other ways cost?

Real `shoal serve` processes: three spans, the middle one twice. An answer stands at a
context of 128, 512 or 1,024 tokens, half prompt and half generated; the middle server is
killed (kill -9) or stopped (SIGSTOP: it accepts, and never answers) at the moment at which
a token has come, and the next one is waited for. Beside it: starting the answer again,
computing its tokens again as one prompt, and what the lost blocks alone take for that.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Final

import torch

from recovery_client import Decoding, Setting, joined, load_setting
from recovery_servers import Fleet, Member, fleet
from report import environment, publish
from rounds import read_accounts, usage_between
from shoal.base.ids import peer_text
from shoal.cli.models import open_model
from shoal.model.rows import rows_to_bytes, torch_dtype
from tiny_model import save_tiny

REAL: Final = "smollm2-135m-instruct"
STAGES: Final = 3
VICTIM: Final = 1
"""Index of the stage that is lost."""

WARM_UP: Final = 8
"""Tokens decoded one by one before the loss; they end the context."""

AFTER: Final = 4
"""Tokens after the pause that must be those of the undisturbed answer too."""

STANDBY_S_MAX: Final = 60.0
STANDBY_LAG: Final = 32
"""Rows that a standby may be behind when it counts as ready: it gets them by the tile."""

PREFILL_FACTOR: Final = 2.5
SHORT_CONTEXT: Final = 128
SHORT_S: Final = 1.0
STOP_S: Final = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A way to lose the server."""

    event: str
    number: int
    standby: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """One measured loss."""

    pause_s: float
    """From the signal to the next token, at the client."""
    reported_s: float
    """`Recovery.pause_s`: from the first sign of trouble to the next row."""
    step_s: float
    """Median of the steps before: what the token would have taken anyway."""
    replayed_tokens: int
    recoveries: int
    numerics: str
    is_same: bool
    """Whether all tokens are those of the undisturbed answer."""
    others_s: float | None
    """Core time of processes outside the benchmark meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The undisturbed answer around one context, and what other ways to get there cost."""

    ids: list[int]
    restart_s: float
    """Prompt, and the answer so far token by token."""
    recompute_s: list[float]
    """Prompt and answer so far as one prompt, into a new session."""
    lost_prefill_s: list[float]
    """As many rows through the blocks of the lost server alone."""


async def _undisturbed(servers: Fleet, setting: Setting, context: int, repeats: int) -> Reference:
    async with joined(servers, setting) as client:
        started_s = time.monotonic()
        async with await client.open_session(setting.dtype) as session:
            decoding = Decoding(session, setting)
            await decoding.prefill(setting.prompt(context // 2))
            while len(decoding.ids) <= context:
                await decoding.step()
            restart_s = time.monotonic() - started_s
            for _ in range(AFTER):
                await decoding.step()
        recompute_s, lost_prefill_s = [], []
        rows = torch.randn(context, setting.model.hidden_size).to(torch_dtype(setting.dtype))
        for _ in range(repeats + 1):  # the first warms up
            started_s = time.monotonic()
            async with await client.open_session(setting.dtype) as session:
                await Decoding(session, setting).prefill(decoding.ids[:context])
            recompute_s.append(time.monotonic() - started_s)
            async with await client.open_session(setting.dtype, setting.spans[VICTIM]) as session:
                started_s = time.monotonic()
                await session.step(rows_to_bytes(rows, setting.dtype), context)
                lost_prefill_s.append(time.monotonic() - started_s)
    return Reference(
        ids=decoding.ids, restart_s=restart_s, recompute_s=recompute_s[1:],
        lost_prefill_s=lost_prefill_s[1:],
    )  # fmt: skip


async def _one_pause(
    servers: Fleet, setting: Setting, loss: Loss, context: int, known: Sequence[int]
) -> Pause:
    """Bring a session to the context, lose the middle server, wait, and bring it back."""
    async with (
        joined(servers, setting, standby=loss.standby) as client,
        await client.open_session(setting.dtype) as session,
    ):
        decoding = Decoding(session, setting)
        await decoding.prefill(known[: context // 2], known[context // 2 : context - WARM_UP])
        if loss.standby:
            await _standby_ready(servers, peer_text(session.chain[VICTIM].peer), decoding)
        steps = [await decoding.step() for _ in range(WARM_UP)]
        victim = servers.named(peer_text(session.chain[VICTIM].peer))
        before = read_accounts()
        victim.signal(loss.number)
        pause_s = await decoding.step()
        after = read_accounts()
        for _ in range(AFTER - 1):
            await decoding.step()
        recoveries, numerics = session.recoveries, session.numerics
    await _bring_back(servers, victim, loss)
    last = recoveries[-1] if recoveries else None
    return Pause(
        pause_s=pause_s,
        reported_s=last.pause_s if last else 0.0,
        step_s=median(steps),
        replayed_tokens=last.replayed_tokens if last else 0,
        recoveries=len(recoveries),
        numerics=numerics,
        is_same=decoding.ids == list(known[: len(decoding.ids)]),
        others_s=usage_between(before, after, {}).others_s if before and after else None,
    )


async def _standby_ready(servers: Fleet, victim: str, decoding: Decoding) -> None:
    """Until the other server of the same blocks holds about what the victim holds."""
    blocks = servers.named(victim).blocks
    (spare,) = (m for m in servers.members.values() if m.blocks == blocks and m.peer != victim)
    async with asyncio.timeout(STANDBY_S_MAX):
        while True:
            held = await spare.order("holdings")
            if held["cache_tokens_in_use"] >= decoding.session.length - STANDBY_LAG:
                return
            await asyncio.sleep(0.05)


async def _bring_back(servers: Fleet, victim: Member, loss: Loss) -> None:
    if loss.number == signal.SIGKILL:
        await victim.wait_gone(10.0)
        await servers.start(victim.name, victim.blocks)
    else:
        victim.signal(signal.SIGCONT)
        await victim.order("holdings")


def _p90(values: Sequence[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def _row(
    model: str, setting: Setting, loss: Loss, context: int, pauses: Sequence[Pause], at: Reference
) -> dict[str, Any]:
    p50_s = median(one.pause_s for one in pauses)
    detection_s = median(one.pause_s - one.reported_s for one in pauses)
    prefill_s = median(at.lost_prefill_s)
    limit_s = detection_s + PREFILL_FACTOR * prefill_s
    if loss.number == signal.SIGSTOP:
        limit_s = STOP_S
    elif context <= SHORT_CONTEXT:
        limit_s = min(limit_s, SHORT_S)
    return {
        "model": model, "dtype": setting.dtype, "context": context, "event": loss.event,
        "standby": loss.standby, "repeats": len(pauses), "p50_s": p50_s,
        "p90_s": _p90([one.pause_s for one in pauses]),
        "reported_s": median(one.reported_s for one in pauses),
        "detection_s": detection_s, "step_s": median(one.step_s for one in pauses),
        "replayed": median(one.replayed_tokens for one in pauses),
        "lost_prefill_s": prefill_s, "recompute_s": median(at.recompute_s),
        "restart_s": at.restart_s, "limit_s": limit_s,
        "is_met": "yes" if p50_s <= limit_s else "no",
        "same_text": f"{sum(one.is_same for one in pauses)} of {len(pauses)}",
    }  # fmt: skip


class Measuring:
    """Everything measured so far, so that Ctrl-C gives the table up to there."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.rows: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}
        self._name = name
        self._options = options

    async def run(self, servers: Fleet, setting: Setting) -> None:
        """All contexts, all losses."""
        for stage, span in enumerate(setting.spans):
            await servers.start(f"stage{stage}", f"{span.start}:{span.end}")
        lost = setting.spans[VICTIM]
        await servers.start("spare", f"{lost.start}:{lost.end}")
        for context in self._options.contexts:
            reference = await _undisturbed(servers, setting, context, self._options.repeats)
            self.details[f"{context}, undisturbed"] = asdict(reference) | {"ids": None}
            for loss in self._losses(context):
                await self._measure(servers, setting, loss, context, reference)

    def _losses(self, context: int) -> list[Loss]:
        killed = [Loss(event="kill -9", number=signal.SIGKILL, standby=n) for n in (0, 1)]
        stopped = [Loss(event="SIGSTOP", number=signal.SIGSTOP, standby=n) for n in (0, 1)]
        return killed + (stopped if context == min(self._options.contexts) else [])

    async def _measure(
        self, servers: Fleet, setting: Setting, loss: Loss, context: int, at: Reference
    ) -> None:
        pauses: list[Pause] = []
        for _ in range(self._options.repeats):
            pauses.append(await _one_pause(servers, setting, loss, context, at.ids))
        self.rows.append(_row(self._name, setting, loss, context, pauses, at))
        name = f"{context}, {loss.event}, standby {loss.standby}"
        self.details[name] = [asdict(one) for one in pauses]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 2 repeats, 128 tokens")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="of every loss")
    parser.add_argument(
        "--contexts", type=lambda text: [int(one) for one in text.split(",")],
        default=[128, 512, 1024], metavar="N,N", help="tokens before the loss",
    )  # fmt: skip
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.contexts = 2, [SHORT_CONTEXT]
    return options


def main() -> None:
    """The demo model, or a tiny one."""
    options = parse()
    torch.set_num_threads(1)
    facts = environment()
    name = "tiny" if options.quick else REAL
    measuring = Measuring(name, options)
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        model = REAL
        if options.quick:
            model = str(Path(folder, "model"))
            save_tiny(Path(model))
        with fleet(Path(folder), model, "--dtype", options.dtype) as servers:
            setting = load_setting(open_model(model), options.dtype, STAGES)
            try:
                asyncio.run(measuring.run(servers, setting))
            except KeyboardInterrupt:
                print("interrupted: what was measured so far")
    if measuring.rows:
        theme = "recovery" if options.dtype == "float32" else f"recovery-{options.dtype}"
        publish(theme, measuring.rows, facts, measuring.details)


if __name__ == "__main__":
    main()
