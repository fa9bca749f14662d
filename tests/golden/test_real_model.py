"""SmolLM2 from its GGUF file: the chain writes what transformers writes."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.base.errors import ModelUnknown
from shoal.hf.detokenize import Detokenizer
from shoal.hf.head import load_head
from shoal.model.known import default_cache_dir
from shoal.model.source import ModelSource, open_source
from tests.golden.chains import Chain, greedy, with_chain

pytestmark = pytest.mark.real_model

NUM_TOKENS = 24
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "<|im_start|>user\nWhy is the sky blue?  In 2 sentences.<|im_end|>\n<|im_start|>assistant\n",
]


@cache
def source() -> ModelSource:
    try:
        return open_source("smollm2-135m-instruct", default_cache_dir(os.environ))
    except ModelUnknown as error:
        pytest.skip(error.detail)


@cache
def whole_model() -> Any:
    model = AutoModelForCausalLM.from_config(source().config)
    tensors = {name: source().read(name) for name in source().tensor_names()}
    loaded = model.load_state_dict(tensors, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"]
    assert not loaded.unexpected_keys
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(prompt: str) -> None:
    tokenizer = source().tokenizer()
    ids = tokenizer(prompt).input_ids
    expected = whole_model().generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )[0, len(ids) :]
    head = load_head(source())
    tokens = with_chain(
        Chain(source(), (0, 10, 17, 30)), lambda chain: greedy(chain, head, ids, NUM_TOKENS)
    )
    assert tokens == expected.tolist()
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()
    assert text == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!  It's 12345 o'clock; don't  wait.",
        "tabs\tand\n\n  indents   7 x",
        "Zoë ate 3½ crêpes 🦊🦊",
        "<|im_start|>user\nhi<|im_end|>",
    ],
)
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = source().tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_tokens_of_their_own_even_after_spaces() -> None:
    tokenizer = source().tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  42").input_ids) == ["x", "ĠĠ", "4", "2"]


def test_the_chat_template_is_the_models() -> None:
    text = (
        source()
        .tokenizer()
        .apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert source().eos_token_ids == (2,)
