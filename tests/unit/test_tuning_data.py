"""Training data: which lines are examples, what counts in them, and in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal.base.errors import ConfigError
from shoal.hf.tuning_examples import (
    IGNORED,
    Example,
    batches,
    label_names,
    prepare,
    split,
    step_examples,
)
from shoal.hf.tuning_lines import read_lines
from tests.tuning_cases import END, TEMPLATE, letters


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


BROKEN = [
    (["{"], "line 1: is not JSON"),
    ([{"text": "a"}, "[1]"], "line 2: is a JSON list"),
    ([{"text": ""}], "line 1: has a 'text' that is not text"),
    ([{"text": 3}], "line 1: has a 'text'"),
    ([{"texts": "a"}], "line 1: has the keys 'texts'"),
    ([{"prompt": "a"}], "line 1: has the keys 'prompt'"),
    ([{"prompt": "a", "completion": ""}], "'completion' that is not text"),
    ([{"text": "a", "messages": []}], "has the keys"),
    ([{"messages": []}], "'messages' that are not a list"),
    ([{"messages": [{"role": "user"}]}], "message 1 without 'role' and 'content'"),
    ([{"messages": [{"role": "user", "content": "a"}]}], "nothing to learn"),
    ([{"text": "a", "label": True}], "'label' that is neither"),
    ([{"text": "a", "label": 1.5}], "'label' that is neither"),
    ([{"text": "a"}, "", {"text": "b", "label": 1}], "line 3: is a label example, line 1 a text"),
    ([], "has no examples"),
]


@pytest.mark.parametrize(("lines", "message"), BROKEN)
def test_broken_lines_are_named(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.jsonl") as caught:
        read_lines(write(tmp_path, *lines))
    assert message in caught.value.detail


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read"):
        read_lines(tmp_path / "absent")
    path = tmp_path / "bytes"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match="line 1: is not UTF-8"):
        read_lines(path)
    path.write_bytes(b"x" * (4 * 1024 * 1024 + 2))
    with pytest.raises(ConfigError, match="line 1: is longer"):
        read_lines(path)


def test_what_counts(tmp_path: Path) -> None:
    """All of a text, the completion, the assistant's turns; the end token with them."""
    tokenizer = letters()
    (text,) = prepare(
        read_lines(write(tmp_path, {"text": "abc"})), tokenizer, length_max=9
    ).examples
    assert learned(tokenizer, text) == "abc" + END
    (pair,) = prepare(
        read_lines(write(tmp_path, {"prompt": "ab", "completion": "cd", "other": 1})),
        tokenizer, length_max=9,
    ).examples  # fmt: skip
    assert tokenizer.decode(pair.ids) == "abcd" + END
    assert learned(tokenizer, pair) == "cd" + END


def test_what_counts_of_a_chat(tmp_path: Path) -> None:
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (chat,) = prepare(
        read_lines(write(tmp_path, {"messages": messages})), tokenizer, length_max=99
    ).examples
    assert tokenizer.decode(chat.ids) == "u:one;a:two;u:three;a:four;"
    assert learned(tokenizer, chat) == "two;four;"


def test_chats_that_cannot_be_learned(tmp_path: Path) -> None:
    messages = [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    lines = read_lines(write(tmp_path, {"messages": messages}))
    tokenizer = letters()
    with pytest.raises(ConfigError, match="line 1: this model has no chat template"):
        prepare(lines, tokenizer, length_max=9)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="line 1: the chat template refuses it: roles must"):
        prepare(lines, tokenizer, length_max=9)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ConfigError, match="writes earlier turns differently"):
        prepare(lines, tokenizer, length_max=9)


def test_long_examples_are_cut_and_empty_ones_left_out(tmp_path: Path) -> None:
    lines = read_lines(
        write(
            tmp_path,
            {"prompt": "abcdef", "completion": "g"},
            {"prompt": "a", "completion": "bcdefg"},
        )
    )
    prepared = prepare(lines, letters(), length_max=4)
    assert (prepared.num_cut, prepared.num_left_out, len(prepared.examples)) == (2, 1, 1)
    with pytest.raises(ConfigError, match="raise --max-length"):
        prepare(lines[:1], letters(), length_max=4)


def test_labels(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": label} for label in (10, 9, "b", "a", 9)]
    lines = read_lines(write(tmp_path, *rows))
    names = label_names(lines)
    assert names == ("9", "10", "a", "b")
    prepared = prepare(lines, letters(), length_max=9, label_names=names)
    assert [one.label for one in prepared.examples] == [1, 0, 3, 2, 0]
    with pytest.raises(ConfigError, match="line 3: label 'b' is not among those"):
        prepare(lines, letters(), length_max=9, label_names=("9", "10"))
    with pytest.raises(ConfigError, match="at least two classes"):
        label_names(lines[1:2])


def test_the_split_is_the_seeds(tmp_path: Path) -> None:
    lines = read_lines(write(tmp_path, *({"text": str(number)} for number in range(40))))
    learned_lines, back = split(lines, share=0.25, seed=1)
    assert (len(learned_lines), len(back)) == (30, 10)
    assert sorted(line.number for line in (*learned_lines, *back)) == list(range(1, 41))
    assert split(lines, share=0.25, seed=1) == (learned_lines, back)
    assert split(lines, share=0.25, seed=2) != (learned_lines, back)
    assert split(lines, share=0.0, seed=1) == (tuple(lines), ())
    with pytest.raises(ConfigError, match="too few"):
        split(lines[:1], share=0.5, seed=1)


def test_every_example_comes_once_an_epoch() -> None:
    taken = [at for step in range(20) for at in step_examples(25, step, per_step=5, seed=3)]
    epochs = [taken[start : start + 25] for start in range(0, 100, 25)]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    # A step tells its examples without those before it, also over the end of an epoch.
    assert step_examples(25, 3, per_step=7, seed=3) == taken[21:28]


def test_batches_are_padded_at_the_end() -> None:
    examples = [
        Example(ids=(5, 6, 7), is_learned=(False, True, True)),
        Example(ids=(8,), is_learned=(True,)),
        Example(ids=(9, 9), is_learned=(True, True), label=1),
    ]
    first, second = batches(examples, [1, 0, 2], batch_size=2, is_classes=False)
    assert first.ids.tolist() == [[8, 0, 0], [5, 6, 7]]
    assert first.labels.tolist() == [[8, IGNORED, IGNORED], [IGNORED, 6, 7]]
    assert (first.lengths, first.num_tokens, first.num_counted) == ((1, 3), 4, 3)
    assert second.lengths == (2,)
    (classes,) = batches(examples, [2], batch_size=2, is_classes=True)
    assert classes.labels.tolist() == [1]


def learned(tokenizer: Any, example: Example) -> str:
    pairs = zip(example.ids, example.is_learned, strict=True)
    text: str = tokenizer.decode([token for token, counts in pairs if counts])
    return text
