"""Reading training data: JSON Lines, one example a line, checked before anything is computed.

Four kinds of lines: `{"text"}`, `{"prompt", "completion"}`, `{"messages": [...]}` and
`{"text", "label"}`. All lines of a file are of one kind; other keys are left alone. What a
line becomes in tokens is in `tuning_examples.py`. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from shoal.base.errors import ConfigError

LINE_BYTES_MAX: Final = 4 * 1024 * 1024
"""A longer line is no example but a file of another format."""

LINES_MAX: Final = 10_000_000
"""Examples are kept in memory: this many short ones are several GiB already."""

LineKind = Literal["text", "completion", "chat", "label"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One example as it stands in a file; only the fields of its kind are used."""

    number: int
    """Counted from 1."""
    kind: LineKind
    text: str = ""
    """The text, or the prompt of a completion."""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    label: str = ""


def read_lines(path: Path) -> list[Line]:
    """All examples of a file; empty lines are skipped.

    Raises:
        ConfigError: no such file, no examples, or a line that is none; names the line.
    """
    lines: list[Line] = []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(LINE_BYTES_MAX + 1), b""), 1):
                if len(raw) > LINE_BYTES_MAX:
                    raise _wrong(path, number, f"is longer than {LINE_BYTES_MAX} bytes")
                if raw.strip():
                    lines.append(_line(path, number, raw))
                if len(lines) > LINES_MAX:
                    raise ConfigError(f"{path} has more than {LINES_MAX} examples: split it")
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror or error}") from error
    if not lines:
        raise ConfigError(f"{path} has no examples: one JSON object a line is expected")
    first = lines[0]
    for line in lines:
        if line.kind != first.kind:
            raise _wrong(
                path, line.number, f"is a {line.kind} example, line {first.number} a {first.kind} "
                "example: give one kind a file",
            )  # fmt: skip
    return lines


def _line(path: Path, number: int, raw: bytes) -> Line:
    try:
        fields = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _wrong(path, number, f"is not UTF-8: {error.reason}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise _wrong(path, number, f"is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _wrong(path, number, f"is a JSON {type(fields).__name__}, not an object")
    try:
        return _parsed(number, fields)
    except ConfigError as error:
        raise _wrong(path, number, error.detail) from error


def _parsed(number: int, fields: Mapping[str, Any]) -> Line:
    found = [one for one, keys in _KEYS.items() if keys <= fields.keys()]
    if "label" in found:
        found.remove("text")
    if len(found) != 1:
        raise ConfigError(
            f"has the keys {', '.join(map(repr, fields)) or '(none)'}: give "
            '{"text"}, {"prompt", "completion"}, {"messages"} or {"text", "label"}'
        )
    return _PARSERS[found[0]](number, fields)


def _text_line(number: int, fields: Mapping[str, Any]) -> Line:
    return Line(number=number, kind="text", text=_string(fields, "text"))


def _completion_line(number: int, fields: Mapping[str, Any]) -> Line:
    return Line(
        number=number,
        kind="completion",
        text=_string(fields, "prompt", may_be_empty=True),
        completion=_string(fields, "completion"),
    )


def _label_line(number: int, fields: Mapping[str, Any]) -> Line:
    label = fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise ConfigError("has a 'label' that is neither text nor a whole number")
    return Line(number=number, kind="label", text=_string(fields, "text"), label=str(label))


def _chat_line(number: int, fields: Mapping[str, Any]) -> Line:
    given = fields["messages"]
    if not isinstance(given, list) or not given:
        raise ConfigError("has 'messages' that are not a list with at least one message")
    messages = []
    for at, one in enumerate(given, 1):
        if not isinstance(one, dict) or not all(
            isinstance(one.get(key), str) for key in ("role", "content")
        ):
            raise ConfigError(f"has a message {at} without 'role' and 'content' as text")
        messages.append(Message(role=one["role"], content=one["content"]))
    if not any(message.role == "assistant" for message in messages):
        raise ConfigError("has no message with the role 'assistant': there is nothing to learn")
    return Line(number=number, kind="chat", messages=tuple(messages))


_KEYS: Final[Mapping[LineKind, frozenset[str]]] = {
    "text": frozenset({"text"}),
    "completion": frozenset({"prompt", "completion"}),
    "chat": frozenset({"messages"}),
    "label": frozenset({"text", "label"}),
}
_PARSERS: Final[Mapping[LineKind, Callable[[int, Mapping[str, Any]], Line]]] = {
    "text": _text_line,
    "completion": _completion_line,
    "chat": _chat_line,
    "label": _label_line,
}


def _string(fields: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    value = fields[key]
    if not isinstance(value, str) or not (value or may_be_empty):
        raise ConfigError(f"has a {key!r} that is not text with at least one character")
    return value


def _wrong(path: Path, number: int, what: str) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}")
