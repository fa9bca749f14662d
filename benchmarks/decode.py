"""How fast is one answer through 2 and 3 servers, beside transformers in one process?

Batch 1, greedy, the same threads everywhere: real `shoal serve` processes and a client on
loopback against the same weights run whole, answer by answer in turns. On one machine the
servers take turns too, so that what a chain loses is the price of the hops. Tokens/s are
decode tokens without the first.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from random_model import saved_folder
from report import environment, publish
from rounds import Rounds, Way, take_rounds
from shoal.base.errors import ModelUnknown
from shoal.model.known import default_cache_dir
from shoal.model.source import open_source
from tiny_model import save_tiny
from workers import Worker, serving, working

REAL = "smollm2-135m-instruct"
ALONE = "transformers, 1 process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model and how to run it."""

    name: str
    model: str
    dtype: str
    servers: tuple[int, ...]
    tokens: int


class Answers:
    """The tokens that each way gave last."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}

    def asking(self, way: str, worker: Worker, num_tokens: int) -> Callable[[], Any]:
        """A round of this way."""

        async def measure() -> float:
            answer = await worker.ask(num_tokens)
            self.tokens[way] = answer["tokens"]
            return float(answer["tokens_per_s"])

        return measure

    def num_same(self, way: str) -> int:
        """Tokens before the first that differs from transformers' own."""
        pairs = zip(self.tokens[way], self.tokens[ALONE], strict=True)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), len(self.tokens[way]))


def start(case: Case, threads: int, stack: ExitStack, answers: Answers) -> dict[str, Way]:
    """All processes of a case; those of the ways that are not at work wait."""
    worker = stack.enter_context(
        working("decode_worker.py", "alone", case.model, case.dtype, threads=threads)
    )
    measure = answers.asking(ALONE, worker, case.tokens)
    ways = {ALONE: Way(workers={"process": worker.pid}, measure=measure)}
    blocks = open_source(case.model, default_cache_dir(os.environ)).config.num_hidden_layers
    for servers in case.servers:
        borders = [index * blocks // servers for index in range(servers + 1)]
        workers: dict[str, int] = {}
        join: str | None = None
        for begin, end in pairwise(borders):
            span = f"{begin}:{end}"
            address, pid = stack.enter_context(serving(case.model, span, case.dtype, threads, join))
            join, workers[f"server {span}"] = join or address, pid
        client = stack.enter_context(
            working("decode_worker.py", "chain", case.model, case.dtype, str(join), threads=threads)
        )
        name = f"shoal, {servers} servers"
        measure = answers.asking(name, client, case.tokens)
        ways[name] = Way(workers=workers | {"client": client.pid}, measure=measure)
    return ways


def measured(case: Case, threads: int, wanted: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, one per way, and every round."""
    answers = Answers()
    with ExitStack() as stack:
        ways = start(case, threads, stack, answers)
        rounds: dict[str, Rounds] = asyncio.run(take_rounds(ways, wanted))
    rows = [
        {
            "model": case.name, "dtype": case.dtype, "way": way, "threads": threads,
            "tokens_per_s": taken.median,
            "lowest": min(taken.kept, default=None), "highest": max(taken.kept, default=None),
            "share": taken.over(rounds[ALONE]),
            "same_tokens": f"{answers.num_same(way)} of {case.tokens}",
            **taken.cells(),
        }
        for way, taken in rounds.items()
    ]  # fmt: skip
    return rows, {f"{case.name}, {way}": taken.details() for way, taken in rounds.items()}


def cases(folder: Path, is_quick: bool) -> list[Case]:
    """What can be measured here."""
    save_tiny(folder)
    tokens = 16 if is_quick else 128
    found = [Case(name="tiny", model=str(folder), dtype="float32", servers=(2, 3), tokens=tokens)]
    try:
        open_source(REAL, default_cache_dir(os.environ))
        found.append(Case(name=REAL, model=REAL, dtype="float32", servers=(2, 3), tokens=tokens))
    except ModelUnknown:
        print(f"{REAL} is not here (make model): left out", file=sys.stderr)
    shape, servers = ("small", (2,)) if is_quick else ("1.1b", (2,))
    model = str(saved_folder(shape))
    found.append(
        Case(name=f"{shape} shape", model=model, dtype="bfloat16", servers=servers,
             tokens=min(tokens, 32))
    )  # fmt: skip
    return found


def main() -> None:
    """The tiny model, the real one if it was fetched, and the 1.1B shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens, 1 round, small shape")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--rounds", type=int, default=5, help="that count, of every way")
    parser.add_argument("--only", metavar="NAME", default="", help="models whose name has this")
    options = parser.parse_args()
    wanted = 1 if options.quick else options.rounds
    facts = environment()
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), options.quick):
            if options.only in case.name:
                new_rows, new_details = measured(case, options.threads, wanted)
                rows += new_rows
                details |= new_details
    publish("decode", rows, facts, details)


if __name__ == "__main__":
    main()
