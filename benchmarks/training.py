"""How fast is training through 1, 2 and 3 servers, beside transformers + peft in one process?

Real `shoal serve` processes and a client on loopback; forward, and forward + backward, of
batches of 4 and 16 sequences of 128 tokens, one thread in each process. Beside it the same
weights, method and values in one process with one thread and with two. Then the same optimiser
steps in both: the losses must agree. Last, tokens of a client that decodes while another one
trains, through the same server.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeVar

from random_model import saved_folder
from report import RESULTS, environment, publish
from rounds import Rounds, Way, take_rounds
from shoal.cli.models import cache_dir
from shoal.model.source import open_source
from tiny_model import save_tiny
from training_memory import free_bytes, needed, refusal
from workers import Worker, serving, working

T = TypeVar("T")

REAL: Final = "smollm2-135m-instruct"
SCRIPT: Final = "training_worker.py"
ONE: Final = "transformers + peft, 1 thread"
TWO: Final = "transformers + peft, 2 threads"
LOSS_TOLERANCE: Final = 1e-3
KINDS: Final = {"forward": "forward", "both": "forward + backward"}
ROUND_S_MIN: Final = 2.0
"""Passes of a round: accounts of others come in ticks of 10 ms, too coarse for shorter ones."""
PROMPT_ROWS: Final = 16
"""Positions that stand before each sequence, at most."""
PETALS: Final = (
    "Petals, measured beside on another day (research figures): 8 blocks 512 wide float32, two "
    "servers: forward 0.73 of transformers, backward 0.45; 1.1B shape bfloat16: 0.85 and 0.48"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a method and what to measure of them."""

    name: str
    model: str
    dtype: str
    method: str
    servers: tuple[int, ...]
    batches: tuple[int, ...]
    length: int
    kinds: tuple[str, ...]
    steps: int
    rounds: int
    decoded: int


class Figures:
    """What workers said besides tokens/s: of each way the peak of memory."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    def asking(self, way: str, trainer: Trainer, request: dict[str, Any]) -> Callable[[], Any]:
        """A round of this way."""
        tokens = int(request["batch"]) * int(request["length"])

        async def measure() -> float:
            took_s, count = 0.0, 0
            while took_s < ROUND_S_MIN:
                found = await trainer.ask(request)
                took_s += tokens / float(found["tokens_per_s"])
                count += 1
                self.peaks[way] = max(found["peak_mb"], self.peaks.get(way, 0.0))
            return count * tokens / took_s

        return measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """One who trains, and the processes that compute meanwhile."""

    worker: Worker
    threads: int
    workers: dict[str, int]
    join: str = ""

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer of its process, which computes with so many threads."""
        found: dict[str, Any] = await self.worker.ask(request | {"threads": self.threads})
        return found


@contextmanager
def trainers(case: Case, *, with_two: bool) -> Iterator[dict[str, Trainer]]:
    """All ways of a case; those who are not at work wait. `with_two`: also on two threads."""
    blocks = open_source(case.model, cache_dir()).config.num_hidden_layers
    spans = {count: _spans(blocks, count) for count in case.servers}
    with ExitStack() as stack:
        firsts = _entered(stack, [_server(case, spans[count][0], None) for count in case.servers])
        joins = {count: first[0] for count, first in zip(case.servers, firsts, strict=True)}
        rest = [(count, span) for count in case.servers for span in spans[count][1:]]
        others = _entered(stack, [_server(case, span, joins[count]) for count, span in rest])
        # One process for both: two of them, with their graphs, are more than many machines have.
        clients = [_worker(case, "alone", threads=2)]
        clients += [_worker(case, "chain", join, threads=1) for join in joins.values()]
        one, *chained = _entered(stack, clients)
        found = {
            name: Trainer(worker=one, threads=threads, workers={"process": one.pid})
            for name, threads in ((ONE, 1), (TWO, 2))[: 1 + with_two]
        }
        for count, first, client in zip(case.servers, firsts, chained, strict=True):
            pids = {f"server {spans[count][0]}": first[1], "client": client.pid}
            for (other, span), (_, pid) in zip(rest, others, strict=True):
                if other == count:
                    pids[f"server {span}"] = pid
            name = f"shoal, {count} server{'s' * (count > 1)}"
            found[name] = Trainer(worker=client, threads=1, workers=pids, join=joins[count])
        yield found


def _spans(blocks: int, count: int) -> list[str]:
    borders = [index * blocks // count for index in range(count + 1)]
    return [f"{start}:{end}" for start, end in pairwise(borders)]


def _server(case: Case, span: str, join: str | None) -> AbstractContextManager[tuple[str, int]]:
    return serving(case.model, span, case.dtype, 1, join)


def _worker(case: Case, role: str, *more: str, threads: int) -> AbstractContextManager[Worker]:
    return working(SCRIPT, role, case.model, case.dtype, case.method, *more, threads=threads)


def _entered(stack: ExitStack, managers: Sequence[AbstractContextManager[T]]) -> list[T]:
    """What they give; two start at a time, since importing everything takes seconds."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(stack.enter_context, managers))


def speeds(case: Case, found: dict[str, Trainer]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and every round."""
    rows, details = [], {}
    chains = " ".join(map(str, case.servers))
    for kind in case.kinds:
        for batch in case.batches:
            figures = Figures()
            request = {"kind": kind, "batch": batch, "length": case.length}
            ways = {
                name: Way(workers=one.workers, measure=figures.asking(name, one, request))
                for name, one in found.items()
            }
            rounds: dict[str, Rounds] = asyncio.run(take_rounds(ways, case.rounds))
            what = KINDS[kind]
            for way, taken in rounds.items():
                rows.append(
                    {
                        "model": case.name, "dtype": case.dtype, "method": case.method,
                        "work": what, "batch": batch, "chains": chains, "way": way,
                        "tokens_per_s": taken.median, "share": taken.over(rounds[ONE]),
                        "client_peak_mb": round(figures.peaks[way]), **taken.cells(),
                    }
                )  # fmt: skip
                key = f"{case.name}, {case.method}, {what}, {batch}, chains {chains}, {way}"
                details[key] = taken.details()
    return rows, details


def losses(case: Case, found: dict[str, Trainer]) -> list[dict[str, Any]]:
    """Losses of the same optimiser steps in all ways, beside those of one process."""
    request = {
        "kind": "train", "batch": min(case.batches), "length": case.length, "steps": case.steps,
    }  # fmt: skip
    told = {name: asyncio.run(_losses(one, request)) for name, one in found.items()}
    rows = []
    for name, own in told.items():
        worst = max(
            abs(mine - other) / abs(other) for mine, other in zip(own, told[ONE], strict=True)
        )
        rows.append(
            {
                "model": case.name, "dtype": case.dtype, "method": case.method, "way": name,
                "steps": case.steps, "first_loss": own[0], "last_loss": own[-1],
                "worst_difference": f"{worst:.1e}",
                "agrees": "yes" if worst <= LOSS_TOLERANCE else "NO",
            }
        )  # fmt: skip
    return rows


def fairness(case: Case, found: dict[str, Trainer]) -> list[dict[str, Any]]:
    """Times between tokens of a client that decodes, without and with one that trains."""
    trainer = found["shoal, 1 server"]
    arguments = ("decode", case.model, case.dtype, case.method, trainer.join)
    with working(SCRIPT, *arguments, threads=1) as client:
        ask = {"tokens": case.decoded}
        asyncio.run(client.ask(ask))
        quiet = asyncio.run(client.ask(ask))
        busy, trained = asyncio.run(_beside(client, ask, trainer, case))
    rows = []
    for name, one in (("decode alone", quiet), ("decode beside training", busy)):
        times = {key: f"{one[f'{key}_ms']:.1f}" for key in ("median", "p95", "longest")}
        rows.append(
            {"model": case.name, "dtype": case.dtype, "case": name,
             "tokens_per_s": one["tokens_per_s"], **{f"{k}_ms": v for k, v in times.items()},
             "trained_tokens_per_s": trained if one is busy else 0.0}
        )  # fmt: skip
    return rows


async def _beside(
    client: Worker, ask: dict[str, Any], trainer: Trainer, case: Case
) -> tuple[dict[str, Any], float]:
    """The decode figures while training runs all the time, and training's tokens/s."""
    request = {"kind": "both", "batch": min(case.batches), "length": case.length}
    decoding = asyncio.ensure_future(client.ask(ask))
    passes = []
    while not decoding.done():
        passes.append(float((await trainer.ask(request))["tokens_per_s"]))
    return await decoding, sum(passes) / len(passes)


async def _losses(trainer: Trainer, request: dict[str, Any]) -> list[float]:
    found = await trainer.ask(request)
    return [float(loss) for loss in found["losses"]]


def that_fit(case: Case) -> tuple[list[Case], list[dict[str, Any]]]:
    """What can be measured at once, one after the other, and a row for each batch that can't.

    Chains that there is memory for take turns with the single process. Where all of them are
    too many, some do, and the others with another such process when these have ended.
    """
    config = open_source(case.model, cache_dir()).config

    def why_not(servers: tuple[int, ...], batch: int) -> str | None:
        need = needed(config, case.dtype, servers, batch, case.length + PROMPT_ROWS)
        return refusal(need, free_bytes())

    fitting, rows = [], []
    for batch in case.batches:
        reason = next(filter(None, (why_not((count,), batch) for count in case.servers)), None)
        if reason is None:
            fitting.append(batch)
            continue
        print(f"batch {batch}: {reason}", file=sys.stderr)
        rows.append(
            {
                "model": case.name, "dtype": case.dtype, "method": case.method,
                "work": "none", "batch": batch, "chains": "-", "way": reason,
                "tokens_per_s": "not measured", "share": "-", "client_peak_mb": "-",
                "rounds": 0, "dropped": 0,
            }
        )  # fmt: skip
    groups: list[tuple[int, ...]] = []
    for count in case.servers if fitting else ():
        if groups and why_not((*groups[-1], count), max(fitting)) is None:
            groups[-1] = (*groups[-1], count)
        else:
            groups.append((count,))
    return [replace(case, batches=tuple(fitting), servers=group) for group in groups], rows


def measured(case: Case, details: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each table."""
    groups, rows = that_fit(case)
    tables: dict[str, list[dict[str, Any]]] = {"training": rows}
    for group in groups:
        with trainers(group, with_two=group is groups[0]) as found:
            taken, rounds = speeds(group, found)
            rows += taken
            details |= rounds
            if group.steps:
                tables.setdefault("training_losses", []).extend(losses(group, found))
            if 1 in group.servers and group.decoded:
                tables["training_fairness"] = fairness(group, found)
    return tables


def cases(options: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """What was asked for."""
    model = options.model
    if options.quick or model == "tiny":
        save_tiny(folder)
        model = str(folder)
    elif model == "1.1b":
        model = str(saved_folder("1.1b"))
    batches = tuple(options.batches or ([2] if options.quick else [4, 16]))
    for method in options.methods or ["prompt"]:
        yield Case(
            name="tiny" if options.quick else options.model,
            model=model,
            dtype=options.dtype,
            method=method,
            servers=tuple(options.servers or (1, 2, 3)),
            batches=batches,
            length=32 if options.quick else options.length,
            kinds=tuple(options.work or KINDS),
            steps=3 if options.quick else options.steps,
            rounds=1 if options.quick else options.rounds,
            decoded=8 if options.quick else options.decoded,
        )


def main() -> None:
    """The demo model in float32 with prompt tuning, unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 1 round")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--model", default=REAL, help="a name, a folder, tiny or 1.1b (random)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="*", choices=("prompt", "deep-prompt", "lora"))
    parser.add_argument("--servers", nargs="*", type=int, help="counts (default: 1 2 3)")
    parser.add_argument("--batches", nargs="*", type=int, help="sizes (default: 4 16)")
    parser.add_argument("--work", nargs="*", choices=KINDS, help="of both (default)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=1, help="that count, of every way")
    parser.add_argument("--steps", type=int, default=3, help="optimiser steps to compare; 0: none")
    parser.add_argument("--decoded", type=int, default=60, help="of the decoding client; 0: none")
    parser.add_argument("--name", default="", help="behind `training` in names of results")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results")
    options = parser.parse_args()
    facts = environment()
    details: dict[str, Any] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    with TemporaryDirectory() as folder:
        for case in cases(options, Path(folder)):
            for theme, rows in measured(case, details).items():
                tables.setdefault(theme, []).extend(rows)
    suffix = f"_{options.name}" if options.name else ""
    for theme, rows in tables.items():
        rounds = details if theme == "training" else None
        publish(theme + suffix, rows, facts, rounds, options.out)
    print(PETALS, file=sys.stderr)


if __name__ == "__main__":
    main()
