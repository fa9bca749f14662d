"""What do LoRA adapters cost a server that decodes?

A batch of 8 sessions decodes on one backend: none with an adapter, one session, all with the same
one, and all shared out over 4 and over 8 different ones. The ways take turns in every round, and a
figure is the median of the rounds' ratios to the round's own batch without adapters. Also: how
long it takes to load one, and its bytes on the wire.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from random_model import SHAPES, random_source
from report import RESULTS, environment, publish
from shoal.base.adapters import AdapterConfig, AdapterId, AdapterPart
from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.spans import Span
from shoal.model.adapter_tensors import adapter_of
from shoal.model.lora import LoraPair
from shoal.model.rows import rows_to_bytes
from shoal.model.torch_backend import BackendConfig, ExactChoice, load_backend

SESSIONS = 8
CONTEXT = 32
STEPS = 3
"""Steps of one way in a round; the fastest counts."""

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
ALL = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
WAYS: dict[str, Sequence[int]] = {
    "none": (0,) * SESSIONS,
    "1 of 8 sessions": (1, *(0,) * (SESSIONS - 1)),
    "1 adapter for all": (1,) * SESSIONS,
    "4 adapters": (1, 2, 3, 4) * (SESSIONS // 4),
    "8 adapters": tuple(range(1, SESSIONS + 1)),
}
"""The adapter of each session, 0: none."""


def make_adapter(
    shape: dict[str, Any], blocks: int, rank: int, targets: Sequence[str], seed: int
) -> AdapterPart:
    """A random adapter of a llama of this shape."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv_size = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, kv_size),
        "self_attn.v_proj": (hidden, kv_size), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        index: {
            target: LoraPair(
                0.02 * torch.randn(rank, sizes[target][0], generator=generator),
                0.02 * torch.randn(sizes[target][1], rank, generator=generator),
            )
            for target in targets
        }
        for index in range(blocks)
    }
    config = AdapterConfig(rank=rank, alpha=2.0 * rank, targets=tuple(sorted(targets)))
    return adapter_of(config, "bfloat16", pairs)


async def step_s(backend: BlockBackend, sequences: Sequence[SequenceId], dtype: str) -> float:
    """Seconds of the fastest of a few decode steps, each taken back again."""
    facts = backend.facts
    payload = bytearray(rows_to_bytes(torch.randn(1, facts.hidden_size), dtype))
    taken = []
    for _ in range(STEPS):
        calls = [
            Call(
                sequence=sequence, span=facts.span, position=CONTEXT, count=1, call_count=1,
                payload=payload, encoding=dtype, output_encoding=dtype, rows_wanted=1,
            )
            for sequence in sequences
        ]  # fmt: skip
        started_s = time.perf_counter()
        outcomes = await backend.run(calls)
        taken.append(time.perf_counter() - started_s)
        for sequence, outcome in zip(sequences, outcomes, strict=True):
            if not isinstance(outcome, bytes):
                raise outcome
            backend.truncate(sequence, CONTEXT)
    return min(taken)


async def open_all(
    backend: BlockBackend, adapters: Sequence[int], first: int, dtype: str
) -> list[SequenceId]:
    """Sessions with some rows in their cache."""
    facts = backend.facts
    sequences = [SequenceId(first + index) for index in range(len(adapters))]
    rows = rows_to_bytes(torch.randn(CONTEXT, facts.hidden_size), dtype)
    for sequence, adapter in zip(sequences, adapters, strict=True):
        backend.open(sequence, facts.span, AdapterId(adapter) if adapter else None)
        call = Call(
            sequence=sequence, span=facts.span, position=0, count=CONTEXT, call_count=CONTEXT,
            payload=bytearray(rows), encoding=dtype, output_encoding=dtype, rows_wanted=0,
        )  # fmt: skip
        (outcome,) = await backend.run([call])
        if not isinstance(outcome, bytes):
            raise outcome
    return sequences


async def measure(
    name: str,
    dtype: str,
    exact: ExactChoice,
    rank: int,
    targets: Sequence[str],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row of the table for each way."""
    shape, span = SHAPES[name], Span(0, options.blocks)
    config = BackendConfig(model=name, dtype=dtype, threads=1, exact=exact)
    backend = load_backend(random_source(shape, span=span), span, config)
    adapters = [
        make_adapter(shape, options.blocks, rank, targets, seed) for seed in range(1, SESSIONS + 1)
    ]
    before_s = time.perf_counter()
    for number, adapter in enumerate(adapters, 1):
        await backend.load_adapter(AdapterId(number), adapter)
    load_s = (time.perf_counter() - before_s) / len(adapters) / options.blocks
    sequences = {
        way: await open_all(backend, chosen, 1 + SESSIONS * number, dtype)
        for number, (way, chosen) in enumerate(WAYS.items())
    }
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way, opened in sequences.items():
            times[way].append(await step_s(backend, opened, dtype))
    is_exact = backend.facts.is_exact
    await backend.aclose()
    return list(rows_of(name, dtype, is_exact, rank, targets, times, load_s, adapters[0], options))


def rows_of(
    name: str,
    dtype: str,
    is_exact: bool,
    rank: int,
    targets: Sequence[str],
    times: dict[str, list[float]],
    load_s: float,
    adapter: AdapterPart,
    options: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """The table's rows of one setting."""
    for way, taken in times.items():
        ratios = [one / base for one, base in zip(taken, times["none"], strict=True)]
        yield {
            "shape": name, "dtype": dtype, "exact": is_exact, "rank": rank,
            "targets": len(targets), "adapters": way,
            "ms_per_block": 1000 * median(taken) / options.blocks,
            "of_none": median(ratios),
            "load_ms_per_block": 1000 * load_s,
            "wire_kB_per_block": adapter.manifest.num_bytes(Span(0, 1)) / 1000,
        }  # fmt: skip


def main() -> None:
    """Measure small and large blocks, attention only and all linear layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--shapes", nargs="*", default=["110m", "1.1b"], choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment()
    rows: list[dict[str, Any]] = []
    choices: tuple[ExactChoice, ...] = ("always", "never")
    for name in options.shapes:
        for dtype in ("float32", "bfloat16"):
            for exact in choices:
                for rank, targets in ((8, ATTENTION), (16, ALL)):
                    rows += asyncio.run(measure(name, dtype, exact, rank, targets, options))
    publish("adapters", rows, facts, folder=options.out)


if __name__ == "__main__":
    main()
