"""The two sides of decode.py, as workers: transformers alone, and a client of a chain.

`python decode_worker.py alone MODEL DTYPE`, `python decode_worker.py chain MODEL DTYPE ADDR`.
A request is a number of tokens; the answer holds decode tokens/s and the tokens.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shoal.cli.joining import SwarmChoice, visit, wall_clock
from shoal.cli.models import open_given, open_model
from shoal.client.chain_session import ChainSession
from shoal.client.client import open_client
from shoal.client.config import ClientConfig
from shoal.hf.detokenize import Detokenizer
from shoal.hf.generation import generate, measure
from shoal.hf.head import Head, load_head
from shoal.hf.sampling import Sampler
from shoal.model.source import ModelSource
from workers import answer, requests

PROMPT = "The three most important things to know about the sea are"


class _Stamps:
    """A streamer that notes when tokens come; the prompt comes first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to flush."""


async def alone(given: str, dtype: str) -> None:
    """transformers' own model and generation loop."""
    source = open_given(given)
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_config(source.config, dtype=kind)
    state = {name: source.read(name).to(kind) for name in source.tensor_names()}
    model.load_state_dict(state, strict=False)
    del state
    model.tie_weights()
    model.eval()
    model.generation_config.eos_token_id = None  # both sides go on, whatever comes
    ids = source.tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    everything = torch.ones_like(ids)  # otherwise tokens that equal the padding are left out
    async for num_tokens in requests():
        stamps = _Stamps()
        tokens = model.generate(
            ids, attention_mask=everything, max_new_tokens=num_tokens,
            do_sample=False, streamer=stamps, pad_token_id=0,
        )  # fmt: skip
        first, last = stamps.at[1], stamps.at[-1]
        answer(
            {"tokens_per_s": (len(stamps.at) - 2) / (last - first),
             "tokens": tokens[0, ids.shape[1] :].tolist()}
        )  # fmt: skip


async def chain(given: str, dtype: str, address: str) -> None:
    """What `shoal generate` does, the same process for all answers."""
    model = open_model(given)
    head = load_head(model.source, dtype=dtype)
    config = ClientConfig(
        model=model.name, num_blocks=model.num_blocks, hidden_size=model.hidden_size
    )
    async with (
        visit(SwarmChoice.parse([address], None, None)) as visitor,
        open_client(
            visitor.identity, visitor.transport, visitor.swarm_pass, visitor.directory, config,
            rng=random.SystemRandom(), wall_clock=wall_clock,
        ) as client,
    ):  # fmt: skip
        async for num_tokens in requests():
            async with await client.open_session(dtype) as session:
                answer(await _one_answer(session, head, model.source, num_tokens))


async def _one_answer(
    session: ChainSession, head: Head, source: ModelSource, num_tokens: int
) -> dict[str, Any]:
    tokenizer = source.tokenizer()
    ids = [int(token) for token in tokenizer(PROMPT)["input_ids"]]
    detokenizer, tokens = Detokenizer(tokenizer), []
    started_s = asyncio.get_running_loop().time()
    async for token in generate(
        session, head, ids, max_new_tokens=num_tokens, sampler=Sampler(temperature=0.0)
    ):
        tokens.append(token)
        detokenizer.push(token.id)
    gaps = [after.at_s - before.at_s for before, after in pairwise(tokens)]
    return {
        "token_p50_ms": 1000 * median(gaps) if gaps else None,
        "tokens_per_s": measure(tokens, started_s).tokens_per_s,
        "tokens": [token.id for token in tokens],
    }


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if sys.argv[1] == "alone":
        asyncio.run(alone(*sys.argv[2:4]))
    else:
        asyncio.run(chain(*sys.argv[2:5]))
