"""What `shoal bench MODEL` measures: one model on this machine, whole and split.

Servers are processes of their own on loopback, as a person would start them; beside them,
in the same run, transformers runs the same weights in one process. All ways take turns,
so that load from elsewhere hits all alike.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final

from shoal.base.errors import ConfigError, ShoalError
from shoal.cli.answering import open_swarm_client
from shoal.cli.joining import SwarmChoice, visit
from shoal.cli.machine import look_at_machine
from shoal.cli.models import OpenModel
from shoal.hf.generation import Speed, generate, measure
from shoal.hf.head import Head, load_head
from shoal.hf.sampling import Sampler

PROMPT: Final = "The three most important things to know about the sea are"
PATIENCE_S: Final = 60.0
STOP_S: Final = 20.0

LOADING_FACTOR: Final = 2.2
"""The whole model and, while it loads, its weights once more."""

BUSY_LOAD: Final = 0.5
"""Load per core from which on figures are worth little."""

BASELINE: Final = "transformers, 1 process"
READY: Final = re.compile(r"ready peer=\S+ address=(\S+)")


class BenchFailed(ShoalError):
    """A server of the benchmark did not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What to measure, and how long."""

    num_tokens: int
    repeats: int
    max_servers: int
    """Chains of 1 to this many servers."""
    threads: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One way to run the model: medians over the repeats."""

    way: str
    tokens_per_s: float
    lowest: float
    highest: float
    time_to_first_token_s: float
    share: float | None
    """Of the baseline's tokens/s; None without a baseline."""

    @property
    def token_ms(self) -> float:
        """Milliseconds per token."""
        return 1000 / self.tokens_per_s if self.tokens_per_s else 0.0


Progress = Callable[[str, int, int], None]


def bench_model(
    model: OpenModel, settings: BenchSettings, progress: Progress
) -> tuple[list[BenchRow], list[str]]:
    """A row per way, and remarks that a reader of the figures must know.

    Raises:
        ConfigError: fewer blocks than servers, or no tokenizer.
        ShoalError: a server did not start or an answer failed.
    """
    if settings.max_servers > model.num_blocks:
        raise ConfigError(
            f"--servers {settings.max_servers}: {model.given} has {model.num_blocks} blocks"
        )
    prompt_ids = [int(one) for one in model.source.tokenizer()(PROMPT)["input_ids"]]
    remarks = _remarks()
    ways: dict[str, Callable[[], Speed]] = {}
    with ExitStack() as stack:
        if _fits(model, settings.dtype):
            ways[BASELINE] = _whole_model(model, settings, prompt_ids)
        else:
            remarks.append("no baseline: the whole model does not fit into the free memory")
        head = load_head(model.source, dtype=settings.dtype)
        for count in range(1, settings.max_servers + 1):
            progress(f"starting {_name(count)}", 0, 1)
            join = stack.enter_context(chain_of_servers(model, count, settings))
            ways[_name(count)] = _chain(model, join, head, settings, prompt_ids)
        speeds = _take_turns(ways, settings.repeats, progress)
    return _rows(speeds), remarks


def hop_ms(rows: list[BenchRow]) -> float | None:
    """What one more server adds to a token; None if only one chain was measured."""
    chains = [row for row in rows if row.way != BASELINE]
    if len(chains) < 2:
        return None
    return (chains[-1].token_ms - chains[0].token_ms) / (len(chains) - 1)


def _take_turns(
    ways: dict[str, Callable[[], Speed]], repeats: int, progress: Progress
) -> dict[str, list[Speed]]:
    """Each way once to warm up, then `repeats` times, in turns."""
    speeds: dict[str, list[Speed]] = {way: [] for way in ways}
    total = (repeats + 1) * len(ways)
    for turn in range(repeats + 1):
        for index, (way, run) in enumerate(ways.items()):
            progress(way, turn * len(ways) + index, total)
            speed = run()
            if turn:
                speeds[way].append(speed)
    progress("done", total, total)
    return speeds


def _rows(speeds: dict[str, list[Speed]]) -> list[BenchRow]:
    base = [one.tokens_per_s for one in speeds.get(BASELINE, [])]
    rows = []
    for way, taken in speeds.items():
        rates = [one.tokens_per_s for one in taken]
        rows.append(
            BenchRow(
                way=way,
                tokens_per_s=median(rates),
                lowest=min(rates),
                highest=max(rates),
                time_to_first_token_s=median(one.time_to_first_token_s for one in taken),
                share=median(rates) / median(base) if base else None,
            )
        )
    return rows


def _name(count: int) -> str:
    return f"shoal, {count} server{'s' if count > 1 else ''}"


def _remarks() -> list[str]:
    load = os.getloadavg()[0]
    if load < BUSY_LOAD * (os.cpu_count() or 1):
        return []
    return [f"this machine is busy (load {load:.1f}): the figures are worth little"]


def _fits(model: OpenModel, dtype: str) -> bool:
    from shoal.model.facts import model_facts

    facts = model_facts(model.source.config)
    free = look_at_machine().memory_free_bytes
    return free is None or LOADING_FACTOR * sum(facts.block_bytes[dtype]) < free


# --- the ways --------------------------------------------------------------------------


class _Stamps:
    """A streamer of transformers that notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def put(self, value: Any) -> None:
        self.at_s.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def _whole_model(
    model: OpenModel, settings: BenchSettings, prompt_ids: list[int]
) -> Callable[[], Speed]:
    import torch
    from transformers import AutoModelForCausalLM

    from shoal.model.rows import torch_dtype

    torch.set_num_threads(settings.threads)
    dtype = torch_dtype(settings.dtype)
    whole = AutoModelForCausalLM.from_config(model.source.config, dtype=dtype)
    state = {name: model.source.read(name).to(dtype) for name in model.source.tensor_names()}
    whole.load_state_dict(state, strict=False)
    whole.tie_weights()
    whole.eval()
    ids = torch.tensor([prompt_ids])
    count = settings.num_tokens

    def run() -> Speed:
        stamps = _Stamps()
        started_s = time.perf_counter()
        whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            streamer=stamps,
            pad_token_id=0,
        )
        first_s, last_s = stamps.at_s[1], stamps.at_s[-1]
        return Speed(
            time_to_first_token_s=first_s - started_s,
            tokens_per_s=(len(stamps.at_s) - 2) / (last_s - first_s),
        )

    return run


def _chain(
    model: OpenModel, join: str, head: Head, settings: BenchSettings, prompt_ids: list[int]
) -> Callable[[], Speed]:
    async def answer() -> Speed:
        clock = asyncio.get_running_loop().time
        async with (
            visit(SwarmChoice.parse([join], None, None)) as visitor,
            open_swarm_client(visitor, model, PATIENCE_S) as client,
        ):
            started_s = clock()
            async with await client.open_session(settings.dtype) as session:
                tokens = generate(
                    session, head, prompt_ids, max_new_tokens=settings.num_tokens, sampler=Sampler()
                )
                return measure([token async for token in tokens], started_s)

    return lambda: asyncio.run(answer())


@contextmanager
def chain_of_servers(model: OpenModel, count: int, settings: BenchSettings) -> Iterator[str]:
    """`count` servers with equal parts of the model; gives the address of the first.

    Raises:
        BenchFailed: one did not start; says what it said.
    """
    borders = [index * model.num_blocks // count for index in range(count + 1)]
    with ExitStack() as stack:
        join: str | None = None
        for start, end in pairwise(borders):
            command = [sys.executable, "-m", "shoal.cli.main", "serve", model.given]
            command += ["--blocks", f"{start}:{end}", "--threads", str(settings.threads)]
            command += ["--dtype", settings.dtype, *(["--join", join] if join else [])]
            address = stack.enter_context(_server(command))
            join = join or address
        yield str(join)


@contextmanager
def _server(command: list[str]) -> Iterator[str]:
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            for line in process.stdout or ():
                match = READY.search(line)
                if match is not None:
                    break
            else:
                process.wait(STOP_S)
                said.seek(0)
                raise BenchFailed(f"a server did not start: {said.read().strip()[-500:]}")
            yield match[1]
        finally:
            process.terminate()
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
