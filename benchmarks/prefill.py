"""How fast does a long prompt go through 1, 2 and 3 servers, its chunks in a pipeline?

The baseline is one backend in this process, one thread, the whole prompt in one call and
in chunks. bfloat16; the chain's time runs from handing over the rows to the last one's
answer. On a machine with fewer cores than servers the servers take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from statistics import median

from model_servers import connected, random_rows, running
from random_model import SHAPES, random_source
from report import environment, publish
from shoal.base.backend import Call, SequenceId
from shoal.base.spans import Span
from shoal.model.torch_backend import BackendConfig, load_backend

LENGTHS = (512, 2048)
SERVERS = (1, 2, 3)
CHUNK = 256


def alone(shape: str, repeats: int) -> dict[tuple[int, int], float]:
    """Rows/s of one process, by (length, chunk)."""
    blocks = int(SHAPES[shape]["num_hidden_layers"])
    span = Span(0, blocks)
    config = BackendConfig(model=shape, dtype="bfloat16", cache_tokens=1 << 14)
    backend = load_backend(random_source(SHAPES[shape], span=span), span, config)
    sequence, speeds = SequenceId(1), {}

    async def once(length: int, chunk: int) -> float:
        backend.open(sequence, span)
        started = time.perf_counter()
        for at in range(0, length, chunk):
            call = Call(
                sequence=sequence, span=span, position=at, count=chunk, call_count=chunk,
                payload=random_rows(shape, chunk), encoding="bfloat16",
                output_encoding="bfloat16", rows_wanted=1,
            )  # fmt: skip
            (outcome,) = await backend.run([call])
            if not isinstance(outcome, bytes):
                raise outcome
        backend.close(sequence)
        return length / (time.perf_counter() - started)

    with asyncio.Runner() as runner:
        for length in LENGTHS:
            for chunk in (length, CHUNK):
                taken = [runner.run(once(length, chunk)) for _ in range(repeats + 1)]
                speeds[length, chunk] = median(taken[1:])
        runner.run(backend.aclose())
    return speeds


async def through_chain(shape: str, records: Sequence[str], length: int, repeats: int) -> float:
    """Rows/s of a prompt through these servers."""
    prompt, speeds = random_rows(shape, length), []
    async with connected(shape, records) as client:
        for _ in range(repeats + 1):
            async with await client.open_session("bfloat16") as session:
                started = time.perf_counter()
                await session.step(prompt, length, chunk_tokens=CHUNK)
                speeds.append(length / (time.perf_counter() - started))
    return median(speeds[1:])


def main() -> None:
    """Rows/s by prompt length and number of servers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small shape, fewer repeats")
    parser.add_argument("--no-write", action="store_true", help="print only")
    quick = parser.parse_args().quick
    shape, repeats = ("small", 2) if quick else ("1.1b", 3)
    facts = environment()
    baseline = alone(shape, repeats)
    rows: list[dict[str, object]] = []
    for num_servers in SERVERS:
        with running(shape, num_servers) as records:
            for length in LENGTHS:
                speed = asyncio.run(through_chain(shape, records, length, repeats))
                rows.append(
                    {"shape": shape, "rows": length, "servers": num_servers, "rows_per_s": speed,
                     "one_process": baseline[length, length],
                     "one_process_chunked": baseline[length, CHUNK],
                     "gain": speed / baseline[length, length]}
                )  # fmt: skip
    publish("prefill", rows, facts)


if __name__ == "__main__":
    main()
