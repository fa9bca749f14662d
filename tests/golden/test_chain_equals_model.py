"""A chain of spans computes what transformers computes on the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.base.backend import SequenceId
from shoal.hf.head import load_head
from tests.golden.chains import Chain, greedy, with_chain
from tests.models import NUM_BLOCKS, PLAIN_FAMILIES, VOCABULARY, tiny_model, tiny_source

BORDERS = [(0, 3, 4, NUM_BLOCKS), (0, 5, NUM_BLOCKS)]
CHUNKS = [(20,), (7, 1, 12)]
DECODE_STEPS = 32


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()


class WholeModel:
    """transformers on one machine: hidden states before the final norm."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = tiny_model(family, dtype)
        self.model.model.norm = torch.nn.Identity()
        self.cache: Any = None

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> torch.Tensor:
        output = self.model.model(
            input_ids=torch.tensor([tokens]), past_key_values=self.cache, use_cache=True
        )
        self.cache = output.past_key_values
        return output.last_hidden_state[0].float()


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("borders", BORDERS, ids=str)
@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_hidden_states_are_bit_equal_in_float32(
    family: str, borders: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    source = tiny_source(family)
    head = load_head(source)
    whole = WholeModel(family)
    tokens = prompt_of(sum(chunks) + DECODE_STEPS)

    async def compare(chain: Chain) -> None:
        done = 0
        for size in (*chunks, *[1] * DECODE_STEPS):
            part = tokens[done : done + size]
            done += size
            ours = chain.tensor(await chain.step(head.embed(part, "float32")))
            assert torch.equal(ours, whole.step(part)), f"differs at position {done - size}"

    with_chain(Chain(source, borders), compare)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    source = tiny_source(family)
    prompt = prompt_of(11)
    expected = tiny_model(family).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=DECODE_STEPS,
        do_sample=False,
    )[0, len(prompt) :]
    head = load_head(source)
    tokens = with_chain(
        Chain(source, (0, 2, NUM_BLOCKS)), lambda chain: greedy(chain, head, prompt, DECODE_STEPS)
    )
    assert tokens == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2_sliding"])
def test_hidden_states_are_bit_equal_in_bfloat16(family: str) -> None:
    source = tiny_source(family)
    head = load_head(source, dtype="bfloat16")
    whole = WholeModel(family, torch.bfloat16)
    tokens = prompt_of(24)

    async def compare(chain: Chain) -> None:
        for part in (tokens[:16], *([token] for token in tokens[16:])):
            ours = chain.tensor(await chain.step(head.embed(part, "bfloat16")))
            theirs = whole.step(part)
            assert torch.equal(ours, theirs)

    with_chain(Chain(source, (0, 3, NUM_BLOCKS), "bfloat16"), compare)


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_truncated_and_forked_sequences_go_on_like_fresh_ones(family: str) -> None:
    source = tiny_source(family)
    head = load_head(source)
    tokens = prompt_of(40)
    kept = 17

    async def recompute(chain: Chain) -> torch.Tensor:
        await chain.step(head.embed(tokens[:kept], "float32"))
        return chain.tensor(await chain.step(head.embed(tokens[kept : kept + 5], "float32")))

    async def fork_and_truncate(chain: Chain) -> list[torch.Tensor]:
        parent, child = SequenceId(0), SequenceId(1)
        await chain.step(head.embed(tokens[:kept], "float32"))
        await chain.step(head.embed(tokens[30:40], "float32"))
        results = []
        for backend in chain.backends:
            assert backend.fork(parent, child, kept) == kept
            assert backend.truncate(parent, kept) == kept
        for sequence in (child, parent):
            chain.length = kept
            rows = head.embed(tokens[kept : kept + 5], "float32")
            results.append(chain.tensor(await chain.step(rows, sequence)))
        return results

    borders = (0, 4, NUM_BLOCKS)
    expected = with_chain(Chain(source, borders), recompute)
    for result in with_chain(Chain(source, borders), fork_and_truncate):
        assert torch.equal(result, expected)
