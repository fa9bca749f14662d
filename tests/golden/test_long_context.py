"""A longrope with its long factors for all sessions: transformers' numbers for long prompts."""

from __future__ import annotations

import pytest
import torch

from shoal.hf.head import load_head
from shoal.model.memory_source import MemorySource
from tests.golden.chains import Chain, with_chain
from tests.golden.test_chain_equals_model import prompt_of
from tests.golden.test_families import WholeModel
from tests.models import tiny_config, tiny_model, tiny_source

FAMILY = "phi3_longrope"
FIRST_TRAINED = 64
TOLERANCE = 1e-5


def long_source() -> MemorySource:
    """The same weights, the config changed as decision 12 says."""
    config = tiny_config(FAMILY)
    config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    return MemorySource(config, tiny_model(FAMILY).state_dict())


@pytest.mark.parametrize("length", [FIRST_TRAINED + 1, 3 * FIRST_TRAINED])
def test_prompts_beyond_the_first_context_are_those_of_transformers(length: int) -> None:
    source = long_source()
    head = load_head(source)
    whole = WholeModel(FAMILY)
    tokens = prompt_of(length + 6)

    async def compare(chain: Chain) -> None:
        # Ours in chunks: transformers sees a long prompt only when it comes in one.
        expected = whole.step(tokens[:length])[0]
        parts = []
        for start in range(0, length, 40):
            parts.append(head.embed(tokens[start : min(start + 40, length)], "float32", start))
        rows = torch.cat([chain.tensor(await chain.step(part)) for part in parts])
        assert (rows - expected).abs().max() <= TOLERANCE * expected.abs().max()
        for position in range(length, length + 6):
            token = tokens[position : position + 1]
            mine = chain.tensor(await chain.step(head.embed(token, "float32", position)))
            theirs = whole.step(token)[0]
            assert (mine - theirs).abs().max() <= TOLERANCE * theirs.abs().max()

    with_chain(Chain(source, (0, 2, 4)), compare)


def test_short_prompts_are_those_of_transformers_up_to_the_end() -> None:
    source = tiny_source(FAMILY)
    head = load_head(source)
    whole = WholeModel(FAMILY)
    tokens = prompt_of(FIRST_TRAINED)

    async def compare(chain: Chain) -> None:
        for part in (tokens[:40], *([token] for token in tokens[40:])):
            rows = await chain.step(head.embed(part, "float32", chain.length))
            assert torch.equal(chain.tensor(rows), whole.step(part)[0])

    with_chain(Chain(source, (0, 2, 4)), compare)
