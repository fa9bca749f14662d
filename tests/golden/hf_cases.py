"""A swarm's model beside transformers' own, and how their texts are compared."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from shoal.hf import AutoDistributedModelForCausalLM, DistributedModelForCausalLM, LocalSwarm
from tests.models import VOCABULARY, tiny_model, tiny_source

GAP_MAX = 1e-4
"""Where the reference's two best scores are closer than this, either may come."""

PAD = 0


class Pair:
    """The same weights at servers and here."""

    def __init__(self, family: str, ours: DistributedModelForCausalLM, swarm: LocalSwarm) -> None:
        self.family = family
        self.ours = ours
        self.swarm = swarm
        self.reference: Any = tiny_model(family)
        self.num_texts = 0
        self.divergences: list[str] = []
        """Texts that differ where they may."""

    @property
    def num_sessions(self) -> int:
        gc.collect()
        self.ours.connection.loop.run(asyncio.sleep(0))  # caches that died are closed by now
        return self.ours.connection.visit.client.num_sessions

    def generate(self, input_ids: torch.Tensor, *, seed: int = 0, **options: Any) -> torch.Tensor:
        """What ours generates, compared with the reference."""
        options.setdefault("attention_mask", torch.ones_like(input_ids))
        texts = []
        for model in (self.ours, self.reference):
            torch.manual_seed(seed)
            texts.append(model.generate(input_ids, pad_token_id=PAD, **options))
        self.compare(*texts, begin=input_ids.shape[1])
        return texts[0]

    def compare(self, ours: torch.Tensor, theirs: torch.Tensor, *, begin: int) -> None:
        """Fail unless the texts are equal, or differ at a near-tie first."""
        assert ours.shape[0] == theirs.shape[0]
        for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
            self.num_texts += 1
            if mine == other:
                continue
            pairs = zip(mine[begin:], other[begin:], strict=False)
            at = begin + next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
            gap = self._gap(other[:at])
            assert gap < GAP_MAX, f"{self.family}: {mine} is not {other}, gap {gap} at {at}"
            self.divergences.append(f"{self.family} at {at}: gap {gap:.1e}")

    @torch.no_grad()
    def _gap(self, text: list[int]) -> float:
        tokens = text[next(i for i, token in enumerate(text) if token != PAD) :]
        best = self.reference(torch.tensor([tokens])).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


@contextmanager
def pair(family: str, **options: Any) -> Iterator[Pair]:
    """A pair over a swarm of three servers."""
    source = tiny_source(family)
    with (
        LocalSwarm(source, **options) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(source, join=swarm) as model,
    ):
        yield Pair(family, model, swarm)


def prompts(rows: int, columns: int, *, seed: int = 1) -> torch.Tensor:
    """(rows, columns) tokens, none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, columns), generator=generator)


def padded(lengths: list[int], *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded rows of these lengths, and their mask."""
    columns = max(lengths)
    ids = prompts(len(lengths), columns, seed=seed)
    mask = torch.tensor([[int(at >= columns - n) for at in range(columns)] for n in lengths])
    return ids.masked_fill(mask == 0, PAD), mask


class Collected(BaseStreamer):  # type: ignore[misc]
    """A streamer that keeps everything."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True
