"""How fast is one answer through 2 and 3 servers, beside transformers in one process?

Batch 1, greedy, float32, the same threads everywhere: real `shoal` processes on loopback
against the same weights run whole. On one machine the servers take turns, so that what a
chain loses is the price of the hops. Tokens/s are decode tokens without the first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from report import environment, publish
from shoal.base.errors import ModelUnknown
from shoal.model.known import default_cache_dir
from shoal.model.source import ModelSource, open_source
from tiny_model import save_tiny

SHOAL = str(Path(sys.executable).with_name("shoal"))
PROMPT = "The three most important things to know about the sea are"
REAL = "smollm2-135m-instruct"


class _Stamps:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


def alone(source: ModelSource, num_tokens: int, repeats: int) -> list[float]:
    """Tokens/s of transformers in this process."""
    model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
    state = {name: source.read(name).float() for name in source.tensor_names()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    model.eval()
    ids = source.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    speeds = []
    for _ in range(repeats + 1):
        stamps = _Stamps()
        model.generate(
            ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
            streamer=stamps, pad_token_id=0,
        )  # fmt: skip
        first, last = stamps.at[1], stamps.at[-1]
        speeds.append((len(stamps.at) - 2) / (last - first))
    return speeds[1:]


@contextmanager
def serving(model: str, span: str, threads: int, join: str | None) -> Iterator[str]:
    """A server; gives its address."""
    command = [SHOAL, "serve", model, "--blocks", span, "--threads", str(threads)]
    command += ["--join", join] if join else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        match = re.search(r"address=(\S+)", process.stdout.readline())
        if match is None:
            raise SystemExit(f"{command} did not start")
        yield match[1]
    finally:
        process.terminate()
        process.wait()


def chained(model: str, blocks: int, servers: int, options: argparse.Namespace) -> list[float]:
    """Tokens/s of `shoal generate` through this many servers with equal parts."""
    borders = [index * blocks // servers for index in range(servers + 1)]
    with ExitStack() as stack:
        join: str | None = None
        for start, end in pairwise(borders):
            span = f"{start}:{end}"
            address = stack.enter_context(serving(model, span, options.threads, join))
            join = join or address
        command = [SHOAL, "generate", model, "--join", str(join), "--prompt", PROMPT, "--json"]
        command += ["--max-new-tokens", str(options.tokens), "--threads", str(options.threads)]
        answers = [
            json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            for _ in range(options.repeats)
        ]
    return [answer["tokens_per_s"] for answer in answers]


def rows_of(name: str, model: str, source: ModelSource, options: argparse.Namespace) -> Any:
    """One row of the table per way to run the model."""
    ways = {"transformers, 1 process": alone(source, options.tokens, options.repeats)}
    for servers in (2, 3):
        blocks = source.config.num_hidden_layers
        ways[f"shoal, {servers} servers"] = chained(model, blocks, servers, options)
    base = median(ways["transformers, 1 process"])
    for way, speeds in ways.items():
        yield {
            "model": name, "way": way, "threads": options.threads, "tokens": options.tokens,
            "tokens_per_s": median(speeds), "lowest": min(speeds), "highest": max(speeds),
            "share": median(speeds) / base,
        }  # fmt: skip


def main() -> None:
    """Measure the tiny model, and the real one if it was fetched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer tokens, one repeat")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    options = parser.parse_args()
    options.tokens, options.repeats = (32, 1) if options.quick else (128, 3)
    torch.set_num_threads(options.threads)
    facts, cache = environment(), default_cache_dir(os.environ)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny(Path(folder))
        rows += rows_of("tiny", folder, open_source(folder, cache), options)
    try:
        rows += rows_of(REAL, REAL, open_source(REAL, cache), options)
    except ModelUnknown:
        print(f"{REAL} is not here (make model): left out", file=sys.stderr)
    publish("decode", rows, facts)


if __name__ == "__main__":
    main()
