"""How much time does one more server add to a token's way?

Servers with blocks that compute nothing, each a process of its own on loopback, with the
real protocol, TLS and all. A hop is (step through 3 servers - step through 1) / 2. Beside
it, in the same run: the round trip of the same bytes through a raw asyncio TCP echo.
"Busy": in the middle server another thread multiplies matrices all the time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack
from statistics import median, quantiles

from processes import BLOCKS, PASS, WALL_MS, running
from report import environment, publish
from shoal.client.client import open_client
from shoal.client.config import ClientConfig
from shoal.discovery.static import StaticDirectory
from shoal.net.identity import Identity
from shoal.net.tcp import TcpTransport

CHAINS = (("0:3",), ("0:1", "1:2", "2:3"))


async def time_ms(step: Callable[[], Awaitable[object]], count: int) -> tuple[float, float]:
    """Median and 95th percentile of `step` in milliseconds, after a fifth as many to warm up."""
    clock, taken = time.perf_counter, []
    for _ in range(count + count // 5):
        started = clock()
        await step()
        taken.append(clock() - started)
    taken = taken[count // 5 :]
    return 1000 * median(taken), 1000 * quantiles(taken, n=20)[-1]


async def time_echo_ms(port: int, size: int, count: int) -> tuple[float, float]:
    """Round trip of `size` bytes through the echo."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def step() -> None:
        writer.write(bytes(size))
        await reader.readexactly(size)

    result = await time_ms(step, count)
    writer.close()
    return result


async def time_chain_ms(
    records: Sequence[str], hidden_size: int, count: int
) -> tuple[float, float]:
    """One decode step through the servers of these records."""
    identity = Identity.generate()
    directory = StaticDirectory(PASS.name, [base64.b64decode(text) for text in records])
    config = ClientConfig(model="wire", num_blocks=BLOCKS, hidden_size=hidden_size)
    async with AsyncExitStack() as stack:
        transport = TcpTransport(identity)
        stack.push_async_callback(transport.close)
        client = await stack.enter_async_context(
            open_client(
                identity,
                transport,
                PASS,
                directory,
                config,
                rng=random.Random(1),
                wall_clock=lambda: WALL_MS / 1000,
            )
        )
        session = await stack.enter_async_context(await client.open_session("bfloat16"))
        row = bytes(hidden_size * 2)
        return await time_ms(lambda: session.step(row, 1), count)


def measure(kib: int, is_busy: bool, count: int) -> dict[str, object]:
    """One row of the table."""
    hidden_size = kib * 512
    times: list[tuple[float, float]] = []
    with running("echo") as port:
        echo_ms, _ = asyncio.run(time_echo_ms(int(port), kib * 1024, count))
    for chain in CHAINS:
        with ExitStack() as stack:
            records = []
            for index, span in enumerate(chain):
                busy = ["busy"] if is_busy and index == len(chain) // 2 else []
                records.append(stack.enter_context(running(span, str(hidden_size), *busy)))
            times.append(asyncio.run(time_chain_ms(records, hidden_size, count)))
    (one_ms, _), (three_ms, three_p95_ms) = times
    hop_ms = (three_ms - one_ms) / (len(CHAINS[1]) - len(CHAINS[0]))
    return {
        "state_kib": kib,
        "engine": "busy" if is_busy else "idle",
        "echo_ms": echo_ms,
        "one_server_ms": one_ms,
        "three_servers_ms": three_ms,
        "three_servers_p95_ms": three_p95_ms,
        "hop_ms": hop_ms,
        "hop_per_echo": hop_ms / echo_ms,
    }


def main() -> None:
    """Measure idle and busy, 8 and 16 KiB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--no-write", action="store_true", help="print only")
    count = 100 if parser.parse_args().quick else 1000
    facts = environment()
    rows = [measure(kib, busy, count) for busy in (False, True) for kib in (8, 16)]
    publish("hop", rows, facts)


if __name__ == "__main__":
    main()
