"""How much more do many sessions get out of two servers than one session does?

Every session decodes on its own (a prompt of 32 rows, then one row after the other); the
figure is rows/s of all of them together. Two server processes with one thread each, one
client, bfloat16. Heads are not applied: on one machine they would take the servers' cores.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from model_servers import connected, random_rows, running
from report import environment, publish
from shoal.client.chain_session import ChainSession

SESSIONS = (1, 8, 16, 32)
PROMPT = 32


async def decode(session: ChainSession, row: bytes, seconds: float) -> tuple[int, float]:
    """Rows and the time they took."""
    started = time.perf_counter()
    count = 0
    while time.perf_counter() - started < seconds:
        await session.step(row, 1)
        count += 1
    return count, time.perf_counter() - started


async def rows_per_s(shape: str, records: Sequence[str], sessions: int, seconds: float) -> float:
    """All sessions together, after everybody's prompt and a second to settle."""
    prompt, row = random_rows(shape, PROMPT), random_rows(shape, 1)
    async with connected(shape, records) as client, AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(await client.open_session("bfloat16"))
            for _ in range(sessions)
        ]
        await asyncio.gather(*(session.step(prompt, PROMPT) for session in opened))
        await asyncio.gather(*(decode(session, row, 1.0) for session in opened))
        results = await asyncio.gather(*(decode(session, row, seconds) for session in opened))
    return sum(count / taken for count, taken in results)


def main() -> None:
    """Rows/s by number of sessions, beside one session before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape only, shorter")
    parser.add_argument("--no-write", action="store_true", help="print only")
    quick = parser.parse_args().quick
    facts = environment()
    rows: list[dict[str, object]] = []
    for shape in ("small",) if quick else ("small", "1.1b"):
        with running(shape, 2) as records:
            alone = 0.0
            for sessions in SESSIONS:
                speed = asyncio.run(rows_per_s(shape, records, sessions, 3.0 if quick else 8.0))
                alone = alone or speed
                rows.append(
                    {"shape": shape, "sessions": sessions, "rows_per_s": speed,
                     "per_session": speed / sessions, "gain": speed / alone}
                )  # fmt: skip
    publish("batching", rows, facts)


if __name__ == "__main__":
    main()
