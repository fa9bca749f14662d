"""Those who train in training.py, as workers: transformers + peft alone, a client of a chain.

`python training_worker.py alone MODEL DTYPE METHOD`,
`python training_worker.py chain MODEL DTYPE METHOD ADDR`,
`python training_worker.py decode MODEL DTYPE METHOD ADDR` (METHOD is of no effect).
A request has a kind: `forward` and `both` time one pass over a batch, `train` does optimiser
steps and answers with their losses, `decode` answers with the times between tokens. It may say how
many threads compute; the worker's own number is the most.
"""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from shoal.cli.models import open_given, open_model
from shoal.hf import AutoDistributedModelForCausalLM
from shoal.hf.tuning_build import Method, build
from shoal.hf.tuning_examples import Batch
from shoal.hf.tuning_model import TunedModel
from shoal.hf.tuning_swarm import SwarmBase
from shoal.hf.tuning_whole import load_whole
from workers import answer, requests

PROMPT_TOKENS: Final = 16
RANK: Final = 8
TARGETS: Final = ("q_proj", "v_proj")
RATE: Final = 1e-2
METHODS: Final = {
    "prompt": Method(name="prompt", prompt_tokens=PROMPT_TOKENS),
    "deep-prompt": Method(name="deep-prompt", prompt_tokens=PROMPT_TOKENS),
    "lora": Method(name="lora", rank=RANK, alpha=2.0 * RANK, targets=TARGETS),
}


class Trainee(Protocol):
    """A model with something to learn, whoever computes it."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is learned."""

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """The mean loss of (B, S) tokens, each predicted from those before."""


class Alone:
    """transformers and peft."""

    def __init__(self, given: str, dtype: str, method: str) -> None:
        base = load_whole(open_given(given), "alone", dtype=dtype)
        config: Any = LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS)
        )
        if method == "prompt":
            config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT_TOKENS)
        torch.manual_seed(1)
        self._model: Any = get_peft_model(base.whole, config)
        start_alike(build(base, METHODS[method], num_classes=0, seed=1), self._model)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [one for one in self._model.parameters() if one.requires_grad]

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids
        ).loss
        return found


class Ours:
    """A client of a chain, or (for deep prompts, which peft has not) our own whole model."""

    def __init__(self, tuned: TunedModel) -> None:
        self._tuned = tuned.train()

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self._tuned.parameters())

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        lengths = (ids.shape[1],) * len(ids)
        found = self._tuned(Batch(ids=ids, lengths=lengths, labels=ids))
        total: torch.Tensor = found.total / found.num_counted
        return total


def alone(given: str, dtype: str, method: str) -> Trainee:
    """Who trains in one process."""
    if method != "deep-prompt":
        return Alone(given, dtype, method)
    base = load_whole(open_given(given), "alone", dtype=dtype)
    return Ours(build(base, METHODS[method], num_classes=0, seed=1))


def start_alike(tuned: TunedModel, theirs: Any) -> None:
    """Give peft's parameters the values that ours begin with."""
    parts = dict(theirs.named_parameters())
    with torch.no_grad():
        if tuned.prompt is not None:
            theirs.prompt_encoder["default"].embedding.weight.copy_(tuned.prompt.prompt)
        for block, layers in ({} if tuned.lora is None else tuned.lora.pairs()).items():
            for target, pair in layers.items():
                name = f"base_model.model.model.layers.{block}.{target}"
                parts[f"{name}.lora_A.default.weight"].copy_(pair.a)
                parts[f"{name}.lora_B.default.weight"].copy_(pair.b)


def tokens(batch: int, length: int, seed: int) -> torch.Tensor:
    """(B, S) ids that every model has; the same for all who train."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 90, (batch, length), generator=generator)


def timed_pass(trainee: Trainee, request: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of one pass, and the most memory the process had meanwhile."""
    ids = tokens(request["batch"], request["length"], 1)
    forget_peak()
    started_s = time.perf_counter()
    if request["kind"] == "forward":
        with torch.no_grad():
            loss = trainee.loss(ids)
    else:
        loss = trainee.loss(ids)
        loss.backward()  # type: ignore[no-untyped-call]
    wall_s = time.perf_counter() - started_s
    for one in trainee.parameters():
        one.grad = None
    return {
        "tokens_per_s": ids.numel() / wall_s,
        "loss": float(loss.detach()),
        "peak_mb": peak_mb(),
    }


def trained(trainee: Trainee, request: dict[str, Any]) -> dict[str, Any]:
    """Losses of so many steps of AdamW, each on a batch of its own; what was learned is undone."""
    before = [one.detach().clone() for one in trainee.parameters()]
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(request["steps"]):
        loss = trainee.loss(tokens(request["batch"], request["length"], 100 + step))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        for one, value in zip(trainee.parameters(), before, strict=True):
            one.copy_(value)
    return {"losses": losses}


def forget_peak() -> None:
    """Let the kernel count the most memory from now on."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # then the peak is that of the whole process, loading included


def peak_mb() -> float:
    """The most memory this process had since `forget_peak`, in MB."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


async def train(trainee: Trainee) -> None:
    """Answer requests, all on one thread: torch's number of threads is each thread's own, and
    so is the memory that is held for the next allocation."""
    kinds: dict[str, Callable[[Trainee, dict[str, Any]], dict[str, Any]]] = {
        "forward": timed_pass, "both": timed_pass, "train": trained,
    }  # fmt: skip

    def answered(request: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(request.get("threads", own_threads()))
        return kinds[request["kind"]](trainee, request)

    with ThreadPoolExecutor(1) as pool:
        async for request in requests():
            answer(await asyncio.get_running_loop().run_in_executor(pool, answered, request))


def own_threads() -> int:
    """How many the worker was started with."""
    return int(os.environ["OMP_NUM_THREADS"])


async def decode(model: Any) -> None:
    """Answer requests with the milliseconds between tokens."""
    async for request in requests():
        answer(await asyncio.to_thread(_gaps, model, int(request["tokens"])))


@torch.no_grad()
def _gaps(model: Any, count: int) -> dict[str, Any]:
    ids, stamps = tokens(1, 16, 7), []
    with model.session() as session:
        rows = session.step_ids(ids, last=True)
        for _ in range(count):
            stamps.append(time.perf_counter())
            rows = session.step_ids(model.logits(rows)[-1:].argmax(-1), last=True)
    gaps = sorted(1e3 * (later - earlier) for earlier, later in pairwise(stamps))
    return {
        "tokens_per_s": 1e3 * len(gaps) / sum(gaps),
        "median_ms": gaps[len(gaps) // 2],
        "p95_ms": gaps[int(0.95 * (len(gaps) - 1))],
        "longest_ms": gaps[-1],
    }


def main() -> None:
    """See above."""
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(own_threads())
    role, given, dtype, method = sys.argv[1:5]
    if role == "alone":
        asyncio.run(train(alone(given, dtype, method)))
        return
    source = open_model(given).source
    with AutoDistributedModelForCausalLM.from_pretrained(
        source, join=sys.argv[5], dtype=dtype
    ) as model:
        if role == "decode":
            asyncio.run(decode(model))
        else:
            # As sent without rounding: what is compared must be the same.
            base = SwarmBase(model, is_rounded="rounded" in sys.argv)
            asyncio.run(train(Ours(build(base, METHODS[method], num_classes=0, seed=1))))


if __name__ == "__main__":
    main()
