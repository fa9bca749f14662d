"""A learned prompt as tokens beyond the vocabulary."""

from __future__ import annotations

import pytest
import torch

from shoal.base.errors import BadInput, ConfigError
from shoal.hf.head import load_head
from shoal.hf.tuning_prompted import PromptedHead
from shoal.model.rows import rows_from_bytes
from tests.models import VOCABULARY, tiny_source


@pytest.mark.parametrize("family", ["llama", "opt", "gemma"])
def test_tokens_beyond_the_vocabulary_are_the_prompt(family: str) -> None:
    """In any order and from any position, as the model treats embeddings that are given."""
    head = load_head(tiny_source(family))
    size = head.hidden_size
    prompt = torch.randn(3, size, generator=torch.Generator().manual_seed(1))
    prompted = PromptedHead(head, prompt)
    assert prompted.prompt_ids == (VOCABULARY, VOCABULARY + 1, VOCABULARY + 2)
    ids = [*prompted.prompt_ids, 5, 7, VOCABULARY + 1]
    rows = rows_from_bytes(prompted.embed(ids, "float32", 4), "float32", 6, size)
    given = torch.cat([prompt, head.look_up(torch.tensor([[5, 7]]))[0], prompt[1:2]])
    expected = head.embed_given(given, "float32", 4)
    assert torch.equal(rows, rows_from_bytes(expected, "float32", 6, size))
    middle = prompted.embed(ids[2:4], "float32", 6)
    assert middle == expected[2 * 4 * size : 4 * 4 * size]
    assert torch.equal(prompted.logits(expected, "float32"), head.logits(expected, "float32"))


def test_what_is_no_token() -> None:
    head = load_head(tiny_source("llama"))
    prompted = PromptedHead(head, torch.ones(2, head.hidden_size))
    with pytest.raises(BadInput, match="no tokens"):
        prompted.embed([], "float32")
    with pytest.raises(BadInput, match="token 98 is beyond vocabulary and prompt"):
        prompted.embed([1, 98], "float32")
    with pytest.raises(BadInput, match="outside the vocabulary"):
        prompted.embed([-1], "float32")
    with pytest.raises(ConfigError, match="a prompt of shape"):
        PromptedHead(head, torch.ones(2, head.hidden_size + 1))
