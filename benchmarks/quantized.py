"""What do smaller weights and compressed links cost, and what do they change?

Three tables: time and bytes of blocks with bfloat16, int8 and int4 weights; the text model's
perplexity with them; error and text when the links between three servers are compressed.
All in this process, on one machine; hops are `hop.py`'s question.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from fixed_text import FIXED_TEXT
from random_model import SHAPES, random_source
from report import environment, publish
from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.errors import ModelUnknown
from shoal.base.spans import Span
from shoal.hf.head import Head, load_head
from shoal.model.known import default_cache_dir
from shoal.model.quantize import Quantization
from shoal.model.quantized_linear import Int4Linear
from shoal.model.quantized_rows import INT8_BLOCK
from shoal.model.rows import rows_from_bytes, rows_to_bytes
from shoal.model.source import ModelSource, open_source
from shoal.model.span_model import SpanModel, block_bytes, load_span
from shoal.model.torch_backend import BackendConfig, load_backend

REAL = "smollm2-135m-instruct"
KINDS: tuple[Quantization, ...] = ("none", "int8", "int4")
CHUNK_ROWS = 128
CONTEXT = 16
GREEDY_TOKENS = 64
PROMPT_TOKENS = 32
SHIFT = 16


def speed_rows(
    name: str, source: ModelSource, span: Span, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Times of one block: 1, 8 and 16 sessions that decode, and one chunk of a prompt.

    The kinds take turns, so that the machine's mood hits all of them.
    """
    configs = {
        kind: BackendConfig(
            model=name, dtype="bfloat16", threads=options.threads, quantize=kind, exact="never"
        )
        for kind in KINDS
    }
    backends = {kind: load_backend(source, span, config) for kind, config in configs.items()}
    times: dict[tuple[Quantization, int], list[float]] = {}
    for turn in range(options.repeats + 1):
        for kind, backend in backends.items():
            for rows, taken_s in asyncio.run(step_times(backend)):
                if turn:  # the first warms up
                    times.setdefault((kind, rows), []).append(taken_s)
    for rows in (1, 8, 16, CHUNK_ROWS):
        base = median(times["none", rows])
        for kind in KINDS:
            taken_s = median(times[kind, rows])
            yield {
                "model": name, "weights": label("bfloat16", kind),
                "rows": rows, "as": "prefill chunk" if rows == CHUNK_ROWS else "decode",
                "ms_per_block": 1000 * taken_s / len(span),
                "tokens_per_s_blocks_only": rows / taken_s * len(span)
                / source.config.num_hidden_layers,
                "speed_up": base / taken_s,
                "MB_per_block": block_bytes(source.config, "bfloat16", kind)[0] / 1e6,
            }  # fmt: skip


async def step_times(backend: BlockBackend) -> list[tuple[int, float]]:
    """(rows, seconds) of a step of each size."""
    taken = []
    for rows in (1, 8, 16, CHUNK_ROWS):
        count = rows if rows == CHUNK_ROWS else 1
        sequences = [SequenceId(index) for index in range(rows // count)]
        for sequence in sequences:
            backend.open(sequence, backend.facts.span)
        await run(backend, sequences, 0, CONTEXT)
        taken.append((rows, await run(backend, sequences, CONTEXT, count)))
        for sequence in sequences:
            backend.close(sequence)
    return taken


async def run(
    backend: BlockBackend, sequences: Sequence[SequenceId], position: int, count: int
) -> float:
    """Seconds for `count` rows of each sequence in one run."""
    facts = backend.facts
    generator = torch.Generator().manual_seed(position)
    rows = torch.randn(count, facts.hidden_size, generator=generator)
    calls = [
        Call(
            sequence=sequence, span=facts.span, position=position, count=count, call_count=count,
            payload=bytearray(rows_to_bytes(rows, "bfloat16")), encoding="bfloat16",
            output_encoding="bfloat16", rows_wanted=count,
        )
        for sequence in sequences
    ]  # fmt: skip
    started_s = time.perf_counter()
    for outcome in await backend.run(calls):
        if not isinstance(outcome, bytes):
            raise outcome
    return time.perf_counter() - started_s


class Chain:
    """A whole model as spans in this process, with an encoding between them."""

    def __init__(self, models: Sequence[SpanModel], head: Head, inner: str | None) -> None:
        self._models = models
        self._head = head
        self._inner = inner
        self._caches = [model.new_cache(model.span) for model in models]
        self._length = 0
        self.borders: list[torch.Tensor] = []
        """Rows of the last step as they were before each border."""

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """(S, V) scores after these tokens."""
        rows = rows_from_bytes(
            self._head.embed(token_ids, "float32"), "float32", len(token_ids),
            self._head.hidden_size,
        ).to(self._models[0].dtype)  # fmt: skip
        self.borders = []
        for index, (model, cache) in enumerate(zip(self._models, self._caches, strict=True)):
            if index:
                self.borders.append(rows)
                rows = self._over_the_wire(rows).to(model.dtype)
            rows = model.forward(rows, self._length, cache, model.span)
            cache.commit(len(token_ids))
        self._length += len(token_ids)
        return self._head.logits(rows_to_bytes(rows, "float32"), "float32")

    def _over_the_wire(self, rows: torch.Tensor) -> torch.Tensor:
        if self._inner is None:
            return rows
        return rows_from_bytes(rows_to_bytes(rows, self._inner), self._inner, *rows.shape)


def perplexity(chain: Chain, ids: Sequence[int]) -> tuple[float, torch.Tensor]:
    """Of all tokens but the first; and the likeliest token at each position."""
    scores = chain.step(ids)[:-1]
    value = math.exp(float(functional.cross_entropy(scores, torch.tensor(ids[1:]))))
    return value, scores.argmax(dim=1)


def share_equal(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """At how many of the positions the likeliest tokens agree."""
    return float((mine == theirs).float().mean())


def greedy(chain: Chain, prompt: Sequence[int]) -> list[int]:
    """The likeliest next tokens."""
    tokens = [int(chain.step(prompt)[-1].argmax())]
    while len(tokens) < GREEDY_TOKENS:
        tokens.append(int(chain.step(tokens[-1:])[-1].argmax()))
    return tokens


def label(dtype: str, kind: Quantization) -> str:
    """What the weights are."""
    return dtype if kind == "none" else kind


def equal_tokens(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are equal before the first that is not."""
    pairs = zip(mine, theirs, strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(mine))


def spans_of(source: ModelSource, dtype: str, kind: Quantization, parts: int) -> list[SpanModel]:
    """The whole model in equal spans."""
    blocks = source.config.num_hidden_layers
    borders = [index * blocks // parts for index in range(parts + 1)]
    return [
        load_span(source, Span(start, end), dtype=dtype, quantize=kind)
        for start, end in pairwise(borders)
    ]


def weight_rows(source: ModelSource, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Perplexity and text with smaller weights; the head stays in float32."""
    head = load_head(source, dtype="float32")
    text: list[int] = []
    base, right = 0.0, torch.empty(0)
    variants: list[tuple[str, Quantization, bool]] = [("float32", "none", False)]
    variants += [("bfloat16", kind, False) for kind in KINDS]
    variants += [("float32", "int8", False), ("float32", "int4", False), ("float32", "int4", True)]
    for dtype, kind, is_shifted in variants:
        models = shifted_int4(source) if is_shifted else spans_of(source, dtype, kind, 1)
        value, likeliest = perplexity(Chain(models, head, None), ids)
        tokens = greedy(Chain(models, head, None), ids[:PROMPT_TOKENS])
        if not base:
            text, base, right = tokens, value, likeliest
        yield {
            "model": REAL, "dtype": dtype, "weights": label(dtype, kind) + ", shifted" * is_shifted,
            "tokens": len(ids), "perplexity": value, "against_float32": value / base - 1,
            "same_likeliest": share_equal(likeliest, right),
            "equal_greedy_tokens": f"{equal_tokens(tokens, text)} of {GREEDY_TOKENS}",
            "MB_of_blocks": sum(block_bytes(source.config, dtype, kind)) / 1e6,
        }  # fmt: skip


def shifted_int4(source: ModelSource) -> list[SpanModel]:
    """The model with weights as int4 leaves them when its groups begin 16 inputs later.

    The demo model's own weights are 4-bit (Q4_1, groups of 32 inputs as ours): int4 hits
    their very grid and loses next to nothing. Shifted groups show an ordinary model's loss.
    """
    models = spans_of(source, "float32", "none", 1)
    with torch.inference_mode():
        for index in range(source.config.num_hidden_layers):
            for module in models[0].block(index).modules():
                if type(module) is torch.nn.Linear:
                    weight = module.weight
                    weight.copy_(weight.roll(SHIFT, dims=1))
                    weight.copy_(Int4Linear(module).dequantized().roll(-SHIFT, dims=1))
    return models


def wire_rows(source: ModelSource, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Perplexity, text and error of the rows when three spans send each other encoded rows."""
    head = load_head(source, dtype="float32")
    for dtype in ("float32", "bfloat16"):
        models = spans_of(source, dtype, "none", 3)
        text: list[int] = []
        base, right = 0.0, torch.empty(0)
        for inner in (dtype, INT8_BLOCK):
            chain = Chain(models, head, inner)
            value, likeliest = perplexity(chain, ids)
            errors = [wire_error(rows, inner) for rows in chain.borders]
            tokens = greedy(Chain(models, head, inner), ids[:PROMPT_TOKENS])
            if not base:
                text, base, right = tokens, value, likeliest
            yield {
                "model": REAL, "dtype": dtype, "links": inner,
                "bytes_per_row": len(rows_to_bytes(chain.borders[0][:1], inner)),
                "rms_error": max(rms for rms, _ in errors),
                "max_error": max(largest for _, largest in errors),
                "perplexity": value, "against_raw": value / base - 1,
                "same_likeliest": share_equal(likeliest, right),
                "equal_greedy_tokens": f"{equal_tokens(tokens, text)} of {GREEDY_TOKENS}",
            }  # fmt: skip


def wire_error(rows: torch.Tensor, encoding: str) -> tuple[float, float]:
    """rms error / rms value, and largest error / largest value, of the worst row each."""
    back = rows_from_bytes(rows_to_bytes(rows, encoding), encoding, *rows.shape).float()
    error, rows = back - rows.float(), rows.float()
    rms = error.norm(dim=1) / rows.norm(dim=1)
    largest = error.abs().amax(dim=1) / rows.abs().amax(dim=1)
    return float(rms.max()), float(largest.max())


def main() -> None:
    """Measure the 1.1B shape, and the real model if it was fetched."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and tokens")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.repeats = 3 if options.quick else 9
    torch.set_num_threads(options.threads)
    facts = environment()
    source = random_source(SHAPES["1.1b"], span=Span(0, 4))
    speeds = list(speed_rows("1.1b shape", source, Span(0, 4), options))
    try:
        real = open_source(REAL, default_cache_dir(os.environ))
    except ModelUnknown:
        publish("quantized_speed", speeds, facts)
        print(f"{REAL} is not here (make model): perplexities left out")
        return
    speeds += speed_rows(REAL, real, Span(0, real.config.num_hidden_layers), options)
    publish("quantized_speed", speeds, facts)
    ids = [int(token) for token in real.tokenizer()(FIXED_TEXT)["input_ids"]]
    ids = ids[:128] if options.quick else ids
    publish("quantized_weights", list(weight_rows(real, ids)), facts)
    publish("compressed_links", list(wire_rows(real, ids)), facts)


if __name__ == "__main__":
    main()
