"""Answers as files: what is written is read; what is broken, foreign or of later times is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.hf.sampling import Sampler
from shoal.hf.saved_answer import (
    BlockClass,
    SavedAnswer,
    block_classes,
    numerics_after,
    pack_answer,
    unpack_answer,
)
from shoal.hf.saved_session import pack, unpack
from shoal.plan.view import ServerView, Stage, SwarmView

tokens = st.lists(st.integers(0, 200_000), max_size=40).map(tuple)
samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 2**63 - 1),
    top_k=st.none() | st.integers(1, 50),
)


def saved_answer(**changes: Any) -> SavedAnswer:
    facts: dict[str, Any] = {
        "model": "ab" * 16,
        "given": "/models/tiny",
        "num_blocks": 7,
        "prompt_ids": (5, 6, 7),
        "token_ids": (8, 9),
        "max_new_tokens": 10,
        "sampler": Sampler(temperature=0.5, seed=3),
        "encoding": "bfloat16",
        "is_compressed": False,
        "numerics": "same-class",
        "classes": (BlockClass(start=0, end=7, numerics="x"),),
    }
    return SavedAnswer(**{**facts, **changes})


@settings(max_examples=30)
@given(prompt=tokens.filter(bool), new=tokens, sampler=samplers, is_compressed=st.booleans())
def test_what_is_packed_is_unpacked(
    prompt: tuple[int, ...], new: tuple[int, ...], sampler: Sampler, is_compressed: bool
) -> None:
    answer = saved_answer(
        prompt_ids=prompt, token_ids=new, sampler=sampler, is_compressed=is_compressed,
        max_new_tokens=len(new) + 1, given="ünd/so weiter",
    )  # fmt: skip
    assert unpack_answer(pack_answer(answer)) == answer


def test_the_library_reads_it_as_a_session_with_the_calls_that_were_made() -> None:
    session = unpack(pack_answer(saved_answer()), 4)
    assert [chunk.values.tolist() for chunk in session.chunks] == [[5, 6, 7], [8], [9]]
    assert [chunk.position for chunk in session.chunks] == [0, 3, 4]
    assert session.borders == (0, 7)
    assert session.generation_config == {
        "do_sample": True,
        "temperature": 0.5,
        "max_new_tokens": 10,
    }


@settings(max_examples=40)
@given(data=st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="no saved session"):
        unpack_answer(data)


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_byte_changes_nothing_or_is_refused(at: int, value: int) -> None:
    data = bytearray(pack_answer(saved_answer()))
    data[at % len(data)] = value
    try:
        answer = unpack_answer(bytes(data))
    except ConfigError:
        return
    assert answer == saved_answer()


@settings(max_examples=40)
@given(length=st.integers(0, 700))
def test_a_file_that_was_cut_off_is_refused(length: int) -> None:
    data = pack_answer(saved_answer())
    with pytest.raises(ConfigError):
        unpack_answer(data[: min(length, len(data) - 1)])


def rewritten(**changes: Any) -> bytes:
    """A file whose note or header says something else."""
    data = pack_answer(saved_answer())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load(data)
    header["digest"] = ""
    for name, value in changes.items():
        if name in header:
            header[name] = value
        elif name in tensors:
            tensors[name] = value
        else:
            header["note"] = json.dumps({**json.loads(header["note"]), name: value})
    return bytes(save(tensors, metadata=header))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "shoal-session-2"}, "version of shoal that wrote it"),
        ({"format": "other"}, "format 'other'"),
        ({"prompt_tokens": 2}, "don't fit together"),
        ({"prompt_tokens": "3"}, "Expected `int`"),
        ({"max_new_tokens": 1}, "2 of 1 new tokens"),
        ({"max_new_tokens": 1 << 40}, "new tokens"),
        ({"sampler": {"temperature": -1}}, "temperature"),
        ({"sampler": {"speed": 1}}, "speed"),
        ({"numerics": "fine"}, "numerics 'fine'"),
        ({"classes": [{"start": 3, "end": 1, "numerics": "x"}]}, "not a span"),
        ({"borders": "[0, 3, 7]"}, "part of the model"),
        ({"note": "[]"}, "no saved answer"),
        ({"note": "{"}, "no saved answer"),
        ({"token_ids": torch.tensor([5, 6, 7, 8, -9])}, "below 0"),
        ({"token_ids": torch.tensor([5, 6, 7, 8])}, "different lengths"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        unpack_answer(rewritten(**changes))


def test_fields_of_later_versions_are_ignored() -> None:
    assert unpack_answer(rewritten(mood="calm")) == saved_answer()


def test_a_session_of_the_library_is_named_as_such() -> None:
    session = unpack(pack_answer(saved_answer()))
    with pytest.raises(ConfigError, match=r"Session\.load"):
        unpack_answer(pack(replace(session, note=None)))


@pytest.mark.parametrize(
    ("answer", "is_complete"),
    [
        (saved_answer(), False),
        (saved_answer(token_ids=()), False),
        (saved_answer(max_new_tokens=2), True),
        (saved_answer(max_new_tokens=2).raised(3), False),
        (saved_answer(token_ids=(8, 1)), True),
        (saved_answer(token_ids=(8, 1)).raised(99), True),
        (saved_answer().raised(1), True),
    ],
)
def test_when_an_answer_is_complete(answer: SavedAnswer, is_complete: bool) -> None:
    assert answer.is_complete({1, 2}) == is_complete


@pytest.mark.parametrize(
    ("before", "session", "classes", "numerics"),
    [
        ("exact", "exact", [(0, 7, "x")], "exact"),
        ("exact", "exact", [(0, 3, "x"), (3, 7, "y")], "crossed"),
        ("exact", "same-class", [(0, 7, "x")], "same-class"),
        ("crossed", "exact", [(0, 7, "x")], "crossed"),
        ("same-class", "crossed", [(0, 7, "x")], "crossed"),
        ("exact", "exact", [], "exact"),
    ],
)
def test_what_the_numbers_are_worth_after_another_class(
    before: str, session: str, classes: list[tuple[int, int, str]], numerics: str
) -> None:
    answer = saved_answer(numerics=before)
    found = [BlockClass(start=a, end=b, numerics=name) for a, b, name in classes]
    assert numerics_after(answer, session, found) == numerics
    grown = answer.grown([11], session, tuple(found))
    assert (grown.token_ids, grown.numerics) == ((8, 9, 11), numerics)


def test_classes_are_those_of_the_hops_that_are_known() -> None:
    one, two = PeerId(b"1" * 32), PeerId(b"2" * 32)
    server = ServerView(peer=one, addresses=(), span=Span(0, 7), numerics="x")
    view = SwarmView(model="m", num_blocks=7, hidden_size=4, servers=(server,))
    chain = [Stage(peer=one, span=Span(0, 3)), Stage(peer=two, span=Span(3, 7))]
    assert block_classes(chain, view) == (BlockClass(start=0, end=3, numerics="x"),)
