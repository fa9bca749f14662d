"""The client's ends of the model beside transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.base.errors import BadInput
from shoal.hf.head import load_head
from shoal.model.memory_source import MemorySource
from shoal.model.onednn_linear import OneDnnLinear
from shoal.model.rows import rows_from_bytes, rows_to_bytes
from tests.models import VOCABULARY, tiny_model, tiny_source

TOKENS = [5, 0, VOCABULARY - 1, 5]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "mistral"])
def test_embedding_and_scores_are_those_of_transformers(family: str) -> None:
    model, head = tiny_model(family), load_head(tiny_source(family))
    with torch.inference_mode():
        embedded = model.model.embed_tokens(torch.tensor(TOKENS))
        scores = model.lm_head(model.model.norm(embedded))
    rows = head.embed(TOKENS, "float32")
    assert rows == rows_to_bytes(embedded, "float32")
    assert torch.equal(head.logits(rows, "float32"), scores)


def test_rows_travel_in_any_encoding() -> None:
    head = load_head(tiny_source())
    exact = head.logits(head.embed(TOKENS, "float32"), "float32")
    for encoding in ("bfloat16", "float16", "int8-block"):
        close = head.logits(head.embed(TOKENS, encoding), encoding)
        assert close.dtype == torch.float32
        assert (close - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("tokens", [[], [-1], [VOCABULARY], [0, VOCABULARY + 3]])
def test_tokens_outside_the_vocabulary_are_refused(tokens: list[int]) -> None:
    with pytest.raises(BadInput):
        load_head(tiny_source()).embed(tokens, "float32")


@pytest.mark.parametrize(("size", "encoding"), [(0, "float32"), (5, "float32"), (192, "int8")])
def test_rows_that_are_not_rows_are_refused(size: int, encoding: str) -> None:
    with pytest.raises(BadInput):
        load_head(tiny_source()).logits(bytes(size), encoding)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_rows_survive_the_round_trip(kind: type) -> None:
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    payload = kind(rows_to_bytes(rows, "float32"))
    assert torch.equal(rows_from_bytes(payload, "float32", 3, 8), rows)


def test_a_network_buffer_is_not_copied() -> None:
    buffer = bytearray(rows_to_bytes(torch.zeros(2, 4), "float32"))
    rows = rows_from_bytes(memoryview(buffer)[16:], "float32", 1, 4)
    buffer[16:20] = rows_to_bytes(torch.tensor([7.0]), "float32")
    assert rows[0, 0] == 7.0


def test_unknown_encodings_are_named() -> None:
    with pytest.raises(BadInput, match="int8"):
        rows_to_bytes(torch.zeros(1, 4), "int8")


def wide_llama(*, is_tied: bool) -> LlamaForCausalLM:
    """Its head is large enough for a layout of its own."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=is_tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_large_head_is_held_as_it_is_multiplied(is_tied: bool) -> None:
    """Its own plain weights go; those that are the embedding too stay."""
    model = wide_llama(is_tied=is_tied)
    head = load_head(MemorySource(model.config, model.state_dict()))
    packed = head.modules()["head"]
    assert isinstance(packed, OneDnnLinear)
    assert not [weight for weight in packed.parameters() if weight.dim() == 2]
    with torch.inference_mode():
        embedded = model.model.embed_tokens(torch.tensor(TOKENS))
        expected = model.lm_head(model.model.norm(embedded))
    rows = head.embed(TOKENS, "float32")
    assert rows == rows_to_bytes(embedded, "float32")
    torch.testing.assert_close(head.logits(rows, "float32"), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_head_that_is_too_large_is_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.hf.head.TIED_BYTES_MAX", 1024 * 64 * 4 - 1)
    model = wide_llama(is_tied=True)
    modules = load_head(MemorySource(model.config, model.state_dict())).modules()
    assert modules["head"].weight is modules["embedding"].weight


def test_gradients_through_a_packed_head() -> None:
    model = wide_llama(is_tied=True)
    head = load_head(MemorySource(model.config, model.state_dict()))
    states = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for scores in (head.score_states, model.lm_head):
        leaf = states.clone().requires_grad_()
        scores(leaf).logsumexp(-1).sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
