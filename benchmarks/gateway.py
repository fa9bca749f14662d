"""How fast does the gateway answer 1, 8 and 32 people, beside transformers' own server?

SmolLM2 in bfloat16. Ours: two `shoal serve` processes and a `shoal gateway`, one compute thread
each. Theirs: `transformers serve`, the whole model in one process with as many threads as there
are cores, one request after the other or with its continuous batching. The same prompts, greedy,
streamed over HTTP by this process. The decode worker without HTTP shows what the gateway adds.

The more streams, the fewer tokens of each (`--tokens` for all), so that a run ends within five
minutes. Their continuous batching gets a cache of 16,384 positions: left alone it takes most of
the machine's memory. Who answers one after the other is not asked 32 at once: its speed is that
of one stream, and the 32nd waits for the 31 before it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import httpx2
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from report import RESULTS, environment, publish
from rounds import Rounds, Way, take_rounds
from shoal.model.known import default_cache_dir
from shoal.model.source import open_source
from workers import SHOAL, Worker, serving, working
from workers import environment as process_environment

MODEL = "smollm2-135m-instruct"
DTYPE = "bfloat16"
STREAMS = (1, 8, 32)
TOKENS = {1: 64, 8: 48}
TOKENS_OF_MANY = 24
STREAMS_IN_TURN_MAX = 8
ROUNDS_OF_ONE = 2
"""So many times as many rounds with one stream: what the gateway adds is a small difference."""
CACHE_FLAGS = ("--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "2048")
START_S = 120.0
DIRECT = "shoal, 2 servers, no HTTP"
GATEWAY = "shoal gateway, 2 servers"
THEIRS = "transformers serve"
BATCHED = "transformers serve, continuous batching"
THINGS = ("sea", "sky", "wind", "river", "forest", "desert", "moon", "city")


@dataclass(slots=True)
class Answered:
    """When the pieces of one answer came."""

    asked_s: float
    pieces_s: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.pieces_s[0] - self.asked_s

    @property
    def gaps_s(self) -> list[float]:
        """Between two tokens."""
        pairs = zip(self.pieces_s, self.pieces_s[1:], strict=False)
        return [after - before for before, after in pairs]


@dataclass(slots=True)
class Server:
    """Something that talks OpenAI's API, and every answer it gave, by round."""

    url: str
    model: str
    tokens: int
    rounds: list[list[Answered]] = field(default_factory=list)

    def asking(self, streams: int) -> Callable[[], Any]:
        """A round: so many answers at once; tokens per second of all together."""

        async def measure() -> float:
            async with httpx2.AsyncClient(timeout=600, limits=httpx2.Limits()) as web:
                started_s = perf_counter()
                asks = (self._ask(web, len(self.rounds), at) for at in range(streams))
                answers = list(await asyncio.gather(*asks))
            self.rounds.append(answers)
            tokens = sum(len(answer.pieces_s) for answer in answers)
            return tokens / (perf_counter() - started_s)

        return measure

    async def _ask(self, web: httpx2.AsyncClient, number: int, at: int) -> Answered:
        # Another prompt each time: no server may have seen it.
        thing = THINGS[at % len(THINGS)]
        text = f"Story {number}-{at}: write a very long story about the {thing} and its people."
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
        }
        answer = Answered(perf_counter())
        async with web.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if _has_text(line):
                    answer.pieces_s.append(perf_counter())
        if not answer.pieces_s:
            raise SystemExit(f"{self.url} gave an answer without text")
        return answer


def _has_text(line: str) -> bool:
    if not line.startswith("data: {"):
        return False
    choices = json.loads(line.removeprefix("data: ")).get("choices")
    return bool(choices and choices[0].get("delta", {}).get("content"))


def saved_model() -> Path:
    """The demo model as a directory that both can read; written the first time."""
    cache = default_cache_dir(os.environ)
    folder = cache / "benchmarks" / f"{MODEL}-{DTYPE}-v1"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = open_source(MODEL, cache)
        started = Path(tempfile.mkdtemp(prefix="smollm2-", dir=folder.parent))
        try:
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(source.config)
            source.config.architectures = [type(whole).__name__]
            source.config.save_pretrained(started)
            source.tokenizer().save_pretrained(started)
            tensors = {
                name: source.read(name).to(getattr(torch, DTYPE)) for name in source.tensor_names()
            }
            save_file(tensors, started / "model.safetensors", metadata={"format": "pt"})
            ends = json.dumps({"eos_token_id": list(source.eos_token_ids)})
            (started / "generation_config.json").write_text(ends, encoding="utf-8")
            started.rename(folder)
        finally:
            shutil.rmtree(started, ignore_errors=True)
    return folder


@contextmanager
def gateway(model: str, join: str, threads: int) -> Iterator[tuple[str, int]]:
    """`shoal gateway`; gives its URL and process id."""
    command = [SHOAL, "gateway", model, "--join", join, "--listen", "127.0.0.1:0"]
    command += ["--threads", str(threads), "--name", "story"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout is not None else ""
        match = re.search(r"url=(\S+)", line)
        if match is None:
            raise SystemExit(f"{' '.join(command)} did not start")
        yield match[1], process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def transformers_serve(model: str, threads: int, *, is_batched: bool) -> Iterator[tuple[str, int]]:
    """`transformers serve` with the model loaded; gives its URL and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(SHOAL).with_name("transformers")), "serve", model, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", DTYPE, "--device", "cpu"]
    command += ["--continuous-batching", *CACHE_FLAGS] if is_batched else []
    environ = process_environment(threads) | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_until_healthy(url, process))
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


async def _until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(START_S), httpx2.AsyncClient() as web:
        while process.poll() is None:
            try:
                if (await web.get(f"{url}/health")).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.2)
    raise SystemExit("transformers serve ended; its reason is above")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def row(way: str, streams: int, server: Server, taken: Rounds) -> dict[str, Any]:
    """Figures of the rounds that count; the first round warmed up."""
    pairs = zip(taken.taken, server.rounds[1:], strict=True)
    answers = [one for judged, found in pairs if not judged.is_disturbed for one in found]
    firsts = [answer.first_s for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    cells: dict[str, Any] = {"way": way, "streams": streams, "tokens_per_s": taken.median}
    for name, values in (("first", firsts), ("token", gaps)):
        cells[f"{name}_p50_ms"] = 1000 * percentile(values, 0.5) if values else None
        cells[f"{name}_p99_ms"] = 1000 * percentile(values, 0.99) if values else None
    return cells | taken.cells()


def measured(options: argparse.Namespace, wanted: int) -> tuple[Any, Any]:
    """Rows of the table, and every round."""
    model = str(saved_model())
    blocks = int(open_source(model, default_cache_dir(os.environ)).config.num_hidden_layers)
    half = blocks // 2
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    with ExitStack() as stack:
        start = stack.enter_context
        join, first = start(serving(model, f"0:{half}", DTYPE, 1, None))
        _, second = start(serving(model, f"{half}:{blocks}", DTYPE, 1, join))
        url, pid = start(gateway(model, join, 1))
        ours = {"server 1": first, "server 2": second, "gateway": pid}
        found: dict[str, tuple[str, str, dict[str, int]]] = {GATEWAY: (url, "story", ours)}
        cores = os.cpu_count() or 1
        for name, is_batched in ((THEIRS, False), (BATCHED, True)):
            if not options.ours_only:
                url, pid = start(transformers_serve(model, cores, is_batched=is_batched))
                found[name] = (url, model, {"process": pid})
        worker = start(working("decode_worker.py", "chain", model, DTYPE, join, threads=1))
        for streams in options.streams:
            tokens = options.tokens or TOKENS.get(streams, TOKENS_OF_MANY)
            servers = {
                name: Server(url, served, tokens)
                for name, (url, served, _) in found.items()
                if name != THEIRS or streams <= STREAMS_IN_TURN_MAX
            }
            ways = {
                name: Way(workers=found[name][2], measure=server.asking(streams))
                for name, server in servers.items()
            }
            direct = Direct(worker, tokens)
            if streams == 1:
                ways[DIRECT] = Way(workers={"client": worker.pid}, measure=direct.measure)
            more = ROUNDS_OF_ONE if streams == 1 else 1
            taken = asyncio.run(take_rounds(ways, more * wanted))
            rows += [row(name, streams, servers[name], taken[name]) for name in servers]
            if DIRECT in taken:
                rows.append(direct.row(taken[DIRECT]))
            details |= {f"{name}, {streams}": one.details() for name, one in taken.items()}
    return rows, details


@dataclass(slots=True)
class Direct:
    """The same chain without a gateway, one answer at a time."""

    worker: Worker
    tokens: int
    token_ms: list[float] = field(default_factory=list)
    """Median time between tokens, by round."""

    async def measure(self) -> float:
        """A round: decode tokens per second."""
        answer = await self.worker.ask(self.tokens)
        self.token_ms.append(answer["token_p50_ms"])
        return float(answer["tokens_per_s"])

    def row(self, taken: Rounds) -> dict[str, Any]:
        """Figures of the rounds that count; the first round warmed up."""
        pairs = zip(taken.taken, self.token_ms[1:], strict=True)
        kept = [token_ms for judged, token_ms in pairs if not judged.is_disturbed]
        return {
            "way": DIRECT, "streams": 1, "tokens_per_s": taken.median, "first_p50_ms": "",
            "first_p99_ms": "", "token_p50_ms": median(kept) if kept else None,
            "token_p99_ms": "", **taken.cells(),
        }  # fmt: skip


def overhead_ms(rows: Sequence[dict[str, Any]]) -> float | None:
    """What a token costs more through HTTP than without, at one stream."""
    by_way = {one["way"]: one["token_p50_ms"] for one in rows if one["streams"] == 1}
    ours, direct = by_way.get(GATEWAY), by_way.get(DIRECT)
    return None if ours is None or direct is None else float(ours - direct)


def main() -> None:
    """All ways, all numbers of streams."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tokens, 1 round, few streams")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--rounds", type=int, default=2, help="that count, of every way")
    parser.add_argument("--tokens", type=int, default=None, help="of each answer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--ours-only", action="store_true", help="without transformers' server")
    parser.add_argument("--streams", type=int, nargs="*", default=None)
    options = parser.parse_args()
    options.streams = options.streams or ((1, 4) if options.quick else STREAMS)
    facts = environment()
    options.tokens = options.tokens or (12 if options.quick else None)
    rows, details = measured(options, 1 if options.quick else options.rounds)
    publish("gateway", rows, facts, details, options.out)
    added = overhead_ms(rows)
    print(f"gateway overhead per token: {'disturbed' if added is None else f'{added:.2f} ms'}")


if __name__ == "__main__":
    main()
