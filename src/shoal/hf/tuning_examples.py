"""From lines to tokens: what is read, what is learned, what is kept for evaluation.

An example says of every token whether its prediction counts: all of a text, only the
completion, only the assistant's turns of a chat. Order and split come from a seed alone,
so that a run that goes on takes the very examples that it would have taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from shoal.base.errors import ConfigError
from shoal.hf.tuning_lines import Line, Message

IGNORED: Final = -100
"""The label of a position whose prediction does not count, as in transformers."""

PAD_ID: Final = 0
"""Stands behind the end of a row. Blocks are causal: nothing before it sees it."""

TEXT_LABELS_MAX: Final = 1000
"""More classes than this are a column that was taken for labels by mistake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence without padding."""

    ids: tuple[int, ...]
    is_learned: tuple[bool, ...]
    """Of each token: whether predicting it counts."""
    label: int = IGNORED
    """The class, for classification."""

    @property
    def num_learned(self) -> int:
        """Tokens that count."""
        return sum(self.is_learned)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The examples of a file."""

    examples: tuple[Example, ...]
    num_cut: int
    """Examples that were longer than allowed."""
    num_left_out: int
    """Examples of which nothing that counts was left."""

    def fingerprint(self) -> str:
        """Changes when any token or label does: a run must go on with the data it had."""
        digest = hashlib.sha256()
        for one in self.examples:
            digest.update(repr((one.ids, one.is_learned, one.label)).encode("ascii"))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of a pass, padded at their ends. B rows, S columns."""

    ids: torch.Tensor
    """(B, S) int64."""
    lengths: tuple[int, ...]
    labels: torch.Tensor
    """(B, S) int64: the token itself where it counts, else -100. For classes: (B,)."""

    @property
    def num_tokens(self) -> int:
        """Tokens, without padding."""
        return sum(self.lengths)

    @property
    def num_counted(self) -> int:
        """Predictions that count."""
        return int((self.labels != IGNORED).sum())


def prepare(
    lines: Sequence[Line],
    tokenizer: Any,
    *,
    length_max: int,
    label_names: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """Tokens of all lines, cut to `length_max`.

    Raises:
        ConfigError: nothing that counts is left of any line, an unknown label, or a chat
            template that can't be used; names the line.
    """
    classes = {name: number for number, name in enumerate(label_names)}
    examples: list[Example] = []
    num_cut = 0
    for done, line in enumerate(lines, 1):
        whole = _example(line, tokenizer, classes)
        cut = Example(
            ids=whole.ids[:length_max], is_learned=whole.is_learned[:length_max], label=whole.label
        )
        num_cut += len(cut.ids) < len(whole.ids)
        if cut.ids and (cut.label != IGNORED or any(cut.is_learned[1:])):
            examples.append(cut)
        progress(done, len(lines))
    if not examples:
        raise ConfigError(
            f"nothing is left to learn when examples are cut to {length_max} tokens: raise "
            "--max-length"
        )
    return Prepared(
        examples=tuple(examples), num_cut=num_cut, num_left_out=len(lines) - len(examples)
    )


def label_names(lines: Sequence[Line]) -> tuple[str, ...]:
    """The classes of labelled lines: numbers in their order, then texts in theirs.

    Raises:
        ConfigError: less than two, or far too many.
    """
    names = sorted({line.label for line in lines}, key=_label_order)
    if len(names) < 2:
        raise ConfigError("all examples have the same label: give at least two classes")
    if len(names) > TEXT_LABELS_MAX:
        raise ConfigError(f"{len(names)} different labels: at most {TEXT_LABELS_MAX} are allowed")
    return tuple(names)


def split(
    lines: Sequence[Line], *, share: float, seed: int
) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """(lines to learn, lines to evaluate): `share` of them, at least one, chosen by `seed`.

    Raises:
        ConfigError: nothing would be left to learn.
    """
    if not share:
        return tuple(lines), ()
    num_kept_back = max(1, round(share * len(lines)))
    if num_kept_back >= len(lines):
        raise ConfigError(
            f"{len(lines)} examples are too few to keep {share:g} of them back for evaluation: add "
            "some, or --eval-share 0"
        )
    back = set(_order(len(lines), seed, 0)[:num_kept_back])
    learned = tuple(line for at, line in enumerate(lines) if at not in back)
    return learned, tuple(lines[at] for at in sorted(back))


def step_examples(num_examples: int, step: int, *, per_step: int, seed: int) -> list[int]:
    """Which examples step `step` (from 0) takes.

    Every example comes once an epoch, in an order of its own each epoch; a step may reach
    over the end of one.
    """
    first = step * per_step
    found: list[int] = []
    epoch, order = -1, []
    for at in range(first, first + per_step):
        if at // num_examples != epoch:
            epoch = at // num_examples
            order = _order(num_examples, seed, epoch + 1)
        found.append(order[at % num_examples])
    return found


def batches(
    examples: Sequence[Example], chosen: Sequence[int], *, batch_size: int, is_classes: bool
) -> Iterator[Batch]:
    """The chosen examples in passes of up to `batch_size` rows."""
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        yield make_batch([examples[at] for at in part], is_classes=is_classes)


def make_batch(examples: Sequence[Example], *, is_classes: bool) -> Batch:
    """Pad examples at their ends."""
    lengths = tuple(len(one.ids) for one in examples)
    ids = torch.full((len(examples), max(lengths)), PAD_ID, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for row, one in enumerate(examples):
        ids[row, : lengths[row]] = torch.tensor(one.ids)
        learned = torch.tensor(one.is_learned)
        labels[row, : lengths[row]][learned] = ids[row, : lengths[row]][learned]
    if is_classes:
        labels = torch.tensor([one.label for one in examples])
    return Batch(ids=ids, lengths=lengths, labels=labels)


def _order(count: int, seed: int, epoch: int) -> list[int]:
    # A hash, so that neighbouring seeds and epochs have nothing to do with each other.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode("ascii")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return [int(at) for at in torch.randperm(count, generator=generator)]


def _label_order(name: str) -> tuple[bool, int, str]:
    is_number = name.lstrip("-").isdecimal()
    return (not is_number, int(name) if is_number else 0, name)


def _example(line: Line, tokenizer: Any, classes: dict[str, int]) -> Example:
    match line.kind:
        case "text":
            ids = _ids(tokenizer, line.text, is_start=True) + _end(tokenizer)
            return Example(ids=ids, is_learned=(True,) * len(ids))
        case "completion":
            before = _ids(tokenizer, line.text, is_start=True) if line.text else ()
            after = _ids(tokenizer, line.completion, is_start=not before) + _end(tokenizer)
            return Example(
                ids=before + after, is_learned=(False,) * len(before) + (True,) * len(after)
            )
        case "label":
            if line.label not in classes:
                known = ", ".join(list(classes)[:10])
                raise ConfigError(
                    f"line {line.number}: label {line.label!r} is not among those of the training "
                    f"data ({known})"
                )
            ids = _ids(tokenizer, line.text, is_start=True)
            return Example(ids=ids, is_learned=(False,) * len(ids), label=classes[line.label])
        case "chat":
            return _chat_example(line, tokenizer)


def _chat_example(line: Line, tokenizer: Any) -> Example:
    """The chat as the model's template writes it; what the assistant says counts."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"line {line.number}: this model has no chat template: give prompt and completion "
            "instead of messages"
        )
    text = _written(tokenizer, line, line.messages, is_asking=False)
    spans = []
    for at, message in enumerate(line.messages):
        if message.role == "assistant":
            before = _written(tokenizer, line, line.messages[:at], is_asking=True)
            through = _written(tokenizer, line, line.messages[: at + 1], is_asking=False)
            if not (text.startswith(through) and through.startswith(before)):
                raise ConfigError(
                    f"line {line.number}: the chat template writes earlier turns differently "
                    f"once later ones follow (message {at + 1}): give each answer as a prompt and "
                    "a completion instead"
                )
            spans.append((len(before), len(through)))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tuple(int(token) for token in coded["input_ids"])
    learned = tuple(
        any(start <= begin and begin < end for start, end in spans)
        for begin, _ in coded["offset_mapping"]
    )
    return Example(ids=ids, is_learned=learned)


def _written(tokenizer: Any, line: Line, messages: Sequence[Message], *, is_asking: bool) -> str:
    given = [{"role": one.role, "content": one.content} for one in messages]
    if not given:
        return ""
    try:
        text: str = tokenizer.apply_chat_template(
            given, tokenize=False, add_generation_prompt=is_asking
        )
    except Exception as error:
        raise ConfigError(f"line {line.number}: the chat template refuses it: {error}") from error
    return text


def _ids(tokenizer: Any, text: str, *, is_start: bool) -> tuple[int, ...]:
    """With the tokens that begin a text, but without those that some tokenizers end it with."""
    if not is_start:
        return tuple(int(t) for t in tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    end = tokenizer.eos_token_id
    return tuple(ids[:-1] if len(ids) > 1 and ids[-1] == end else ids)


def _end(tokenizer: Any) -> tuple[int, ...]:
    end = tokenizer.eos_token_id
    return () if end is None else (int(end),)
