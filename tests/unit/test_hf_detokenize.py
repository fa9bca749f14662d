"""Streaming text: whole characters only, and in the end the whole text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.hf.detokenize import Detokenizer


def byte_tokenizer() -> Any:
    """One token per byte, plus an end token."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"eos_token": "<end>"})
    return fast


def word_tokenizer() -> Any:
    """Words with a leading-space mark that the decoder strips from the first one."""
    words = ["▁a", "▁bee", "c", "▁", "é"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="c"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()
WORDS = word_tokenizer()


@settings(deadline=None)
@given(st.text(max_size=40))
def test_pieces_are_whole_characters_and_add_up(text: str) -> None:
    ids = BYTES(text).input_ids
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.finish() == BYTES.decode(ids) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_tokens_add_up_to_their_decoding(ids: list[int]) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == BYTES.decode(ids, skip_special_tokens=True)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=20))
def test_leading_spaces_survive(ids: list[int]) -> None:
    detokenizer = Detokenizer(WORDS)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == WORDS.decode(ids)


def test_a_character_comes_when_its_last_byte_comes() -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in BYTES("a🦊b").input_ids]
    assert pieces == ["a", "", "", "", "🦊", "b"]


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_shown_on_demand(skip: bool) -> None:
    detokenizer = Detokenizer(BYTES, skip_special_tokens=skip)
    text = detokenizer.push(BYTES.eos_token_id) + detokenizer.finish()
    assert text == ("" if skip else "<end>")
