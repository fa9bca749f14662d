"""Models, company and scripts for tests of exact mode."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from shoal.base.backend import Call, SequenceId
from shoal.base.spans import Span
from shoal.model.batched_backend import BatchedBackend
from shoal.model.block_rows import kept_tokens
from shoal.model.memory_source import MemorySource
from shoal.model.torch_backend import BackendConfig, ExactChoice, load_backend

BLOCKS = 3
SPAN = Span(0, BLOCKS)
_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES),
    "llama-wide": LlamaConfig(**_SIZES | {"hidden_size": 256, "intermediate_size": 704}),
    "mistral-sliding": MistralConfig(**_SIZES, sliding_window=21),
    "qwen2": Qwen2Config(**_SIZES | {"hidden_size": 64, "intermediate_size": 160}),
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
}
_GROUPED: dict[str, Any] = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}
MIXTURES = {
    "qwen3_moe": _SIZES | _EXPERTS | {"head_dim": 16},
    "mixtral": _SIZES | _EXPERTS | {"intermediate_size": 64},
    "gpt_oss": _SIZES
    | _EXPERTS
    | {
        "intermediate_size": 64,
        "head_dim": 16,
        "sliding_window": 21,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm4_moe": _SIZES | _EXPERTS | _GROUPED | {"head_dim": 16},
    "deepseek_v3": _SIZES | _EXPERTS | _GROUPED | _LATENT,
}
CONFIGS |= {name: AutoConfig.for_model(name, **sizes) for name, sizes in MIXTURES.items()}

_numbers = itertools.count(1)


@dataclass
class Sequence_:
    """One sequence on a backend: what was asked and answered."""

    span: Span = SPAN
    number: SequenceId = field(default_factory=lambda: SequenceId(next(_numbers)))
    length: int = 0
    outputs: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """`count` rows of a call that first had `call_count`."""

    count: int
    call_count: int


@cache
def source(name: str) -> MemorySource:
    """A seeded random model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(CONFIGS[name])
        with torch.no_grad():
            for key, weight in model.named_parameters():
                weight.normal_(1.0 if "norm" in key else 0.0, 0.08)
    return MemorySource(model.config, model.state_dict())


@cache
def backend(name: str, dtype: str, copy: int = 0, exact: ExactChoice = "always") -> BatchedBackend:
    """A backend of that model; each `copy` is loaded anew. Lives as long as the tests."""
    config = BackendConfig(model=name, dtype=dtype, engine="batched", exact=exact)
    loaded = load_backend(source(name), SPAN, config)
    assert isinstance(loaded, BatchedBackend)
    return loaded


def rows_at(seed: int, position: int, count: int, hidden_size: int) -> bytes:
    """A sequence's rows, float32: the same however they are cut into calls."""
    rows = []
    for index in range(position, position + count):
        generator = torch.Generator().manual_seed(seed * 100_003 + index)
        rows.append(torch.randn(hidden_size, generator=generator))
    return torch.stack(rows).numpy().tobytes()


def run_steps(target: BatchedBackend, work: Sequence[tuple[Sequence_, int, Step]]) -> None:
    """One run: each sequence's next step, its rows made from a seed."""
    calls = []
    ends: dict[SequenceId, int] = {}
    for sequence, seed, step in work:
        position = ends.get(sequence.number, sequence.length)
        ends[sequence.number] = position + step.count
        calls.append(
            Call(
                sequence=sequence.number,
                span=sequence.span,
                position=position,
                count=step.count,
                call_count=step.call_count,
                payload=rows_at(seed, position, step.count, target.facts.hidden_size),
                encoding="float32",
                output_encoding=target.facts.encodings[0],
                rows_wanted=step.count,
            )
        )
    outcomes = asyncio.run(target.run(calls))
    for (sequence, _, step), outcome in zip(work, outcomes, strict=True):
        assert isinstance(outcome, bytes), outcome
        sequence.outputs.append(outcome)
        sequence.length += step.count


def opened(target: BatchedBackend, span: Span = SPAN) -> Sequence_:
    """A fresh sequence."""
    sequence = Sequence_(span=span)
    target.open(sequence.number, span)
    return sequence


def play(
    target: BatchedBackend,
    steps: Sequence[Step],
    *,
    seed: int = 1,
    company: random.Random | None = None,
    others: int = 3,
    at_once: int = 1,
) -> tuple[bytes, list[torch.Tensor]]:
    """A sequence's outputs and cache bits after `steps`, alone or among random others.

    Up to `at_once` steps go into one run, as a replay does.
    """
    subject = opened(target, target.facts.span)
    friends: list[Sequence_] = []
    for at in range(0, len(steps), at_once):
        work = [(subject, seed, step) for step in steps[at : at + at_once]]
        if company is not None:
            friends = _visited(target, friends, company, others)
            for friend in friends:
                if company.random() < 0.7:
                    count = company.choice([1, 1, 1, 1, 2, 7, 8, 9, 17])
                    work.append((friend, company.randrange(99), Step(count, count)))
            company.shuffle(work)
            # Consecutive calls of one sequence stay in order.
            own = iter(steps[at : at + at_once])
            work = [(subject, seed, next(own)) if item[0] is subject else item for item in work]
        run_steps(target, work)
    cached = cache_bits(target, subject)
    for sequence in (subject, *friends):
        target.close(sequence.number)
    return b"".join(subject.outputs), cached


def _visited(
    target: BatchedBackend, friends: list[Sequence_], rng: random.Random, others: int
) -> list[Sequence_]:
    """Company comes and goes."""
    kept = [friend for friend in friends if rng.random() < 0.9]
    for friend in friends:
        if friend not in kept:
            target.close(friend.number)
    while len(kept) < others:
        start = rng.randrange(BLOCKS)
        kept.append(opened(target, rng.choice([SPAN, Span(start, rng.randint(start + 1, BLOCKS))])))
    return kept


def cache_bits(target: BatchedBackend, sequence: Sequence_) -> list[torch.Tensor]:
    """Keys and values of every block: all that a block surely keeps."""
    held = target._cache(sequence.number)
    windows = target._model.windows
    return [
        part.clone()
        for block in range(held.span.start, held.span.end)
        for part in held.read(block, _first_kept(held.length, windows[block]), held.length)
    ]


def _first_kept(length: int, window: int | None) -> int:
    return 0 if window is None else max(length - kept_tokens(window), 0)
