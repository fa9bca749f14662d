"""Tool calls in a model's own words: found in its text, family by family.

A chat template tells a model how to write a call; which way that is can be read from the
template. Ways that are known here are in `_WAYS`. What looks like a call and is none
(broken JSON, say) stays text: a reader can make more of it than of an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

CALL_CHARS_MAX: Final = 1 << 20
"""Longer than any context; a call that never ends is text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCall:
    """One call; `arguments` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a family of models writes calls."""

    name: str
    opening: str
    closing: str
    """Empty: a call goes on to the end of the answer."""
    read: Callable[[str], list[FoundCall]]
    """The calls in the text between; raises ValueError, KeyError or TypeError if it is none."""
    is_bare: bool = False
    """An answer that begins with `{` is a call too."""


def find_way(template: str) -> Way | None:
    """How models with this chat template write calls; None: in no way known here."""
    return next((way for mark, way in _WAYS if mark in template), None)


class CallReader:
    """Feed pieces of an answer, get text and calls in order."""

    def __init__(self, way: Way) -> None:
        self.num_calls = 0
        """Calls found so far."""
        self._way = way
        self._opened = ""
        self._held = ""
        self._is_open = False
        self._has_begun = False
        """Something that is not white space was shown."""

    def push(self, piece: str) -> list[str | FoundCall]:
        """What is complete by now."""
        self._held += piece
        found: list[str | FoundCall] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[str | FoundCall]:
        """The rest."""
        held, self._held = self._held, ""
        if not self._is_open:
            return [held] if held and (held.strip() or not self.num_calls) else []
        self._is_open = False
        try:
            calls = self._way.read(held)
            self.num_calls += len(calls)
            return [*calls]
        except (ValueError, KeyError, TypeError):
            return [self._opened + held]

    def _step(self, found: list[str | FoundCall]) -> bool:
        """Move on by one border; whether there may be another."""
        return self._close(found) if self._is_open else self._open(found)

    def _open(self, found: list[str | FoundCall]) -> bool:
        way, text = self._way, self._held
        begun = text.lstrip()
        if way.is_bare and not self._has_begun and begun.startswith("{"):
            self._is_open, self._opened, self._held = True, "", text
            return True
        at = text.find(way.opening)
        if at >= 0:
            self._show(text[:at].rstrip() if way.closing else text[:at], found)
            self._is_open, self._opened = True, way.opening
            self._held = text[at + len(way.opening) :]
            return True
        kept = max(
            (size for size in range(1, len(way.opening)) if text.endswith(way.opening[:size])),
            default=0,
        )
        if not text[: len(text) - kept].strip():
            kept = len(text)  # white space before a call is not part of the answer
        self._show(text[: len(text) - kept], found)
        self._held = text[len(text) - kept :]
        return False

    def _close(self, found: list[str | FoundCall]) -> bool:
        way = self._way
        at = self._held.find(way.closing) if way.closing else -1
        if at < 0:
            if len(self._held) > CALL_CHARS_MAX:
                self._show(self._opened + self._held, found)
                self._held, self._is_open = "", False
            return False
        inside, self._held = self._held[:at], self._held[at + len(way.closing) :]
        self._is_open = False
        try:
            calls = way.read(inside)
            found += calls
            self.num_calls += len(calls)
        except (ValueError, KeyError, TypeError):
            self._show(self._opened + inside + way.closing, found)
        return True

    def _show(self, text: str, found: list[str | FoundCall]) -> None:
        if text:
            self._has_begun = self._has_begun or bool(text.strip())
            found.append(text)


def read_forced(text: str) -> list[FoundCall]:
    """The call in an answer that a grammar forced to be one.

    Raises:
        ValueError: it was cut before its end.
    """
    return [_call(json.loads(text), "arguments")]


def forced_schema(tools: Sequence[tuple[str, dict[str, Any] | None]]) -> dict[str, Any]:
    """A JSON schema whose instances are calls of one of these (name, parameters)."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, parameters in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _call(value: Any, key: str) -> FoundCall:
    arguments = value[key] if key in value else value["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    name = value["name"]
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError("a call is a name and an object")
    return FoundCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def _one_object(text: str) -> list[FoundCall]:
    return [_call(json.loads(text), "arguments")]


def _llama(text: str) -> list[FoundCall]:
    # Several calls come one behind the other, with a semicolon or a line between them.
    decoder, rest, found = json.JSONDecoder(), text.strip(), []
    while rest:
        value, end = decoder.raw_decode(rest)
        found.append(_call(value, "parameters"))
        rest = rest[end:].lstrip("; \n")
    return found


def _mistral(text: str) -> list[FoundCall]:
    stripped = text.strip()
    if stripped.startswith("["):
        return [_call(value, "arguments") for value in json.loads(stripped)]
    # From version 11 of its tokenizer on: NAME[ARGS]{...}, or NAME{...}.
    found = []
    for part in stripped.split("[TOOL_CALLS]"):
        name, brace, rest = part.partition("{")
        name = name.split("[CALL_ID]")[0].removesuffix("[ARGS]").strip()
        found.append(_call({"name": name, "arguments": json.loads(brace + rest)}, "arguments"))
    return found


_FUNCTION: Final = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", re.DOTALL)
_PARAMETER: Final = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _tagged(text: str) -> list[FoundCall]:
    match = _FUNCTION.fullmatch(text)
    if match is None:
        raise ValueError("no <function=NAME>")
    arguments = {name: _value(value) for name, value in _PARAMETER.findall(match[2])}
    return [_call({"name": match[1].strip(), "arguments": arguments}, "arguments")]


def _value(text: str) -> Any:
    """JSON where it is JSON, else the text: these models quote no strings."""
    try:
        return json.loads(text)
    except ValueError:
        return text


_TAGGED: Final = Way(name="tagged", opening="<tool_call>", closing="</tool_call>", read=_tagged)
_HERMES: Final = Way(name="hermes", opening="<tool_call>", closing="</tool_call>", read=_one_object)
_MISTRAL: Final = Way(name="mistral", opening="[TOOL_CALLS]", closing="", read=_mistral)
_LLAMA: Final = Way(name="llama", opening="<|python_tag|>", closing="", read=_llama, is_bare=True)

_WAYS: Final = (
    ("<function=", _TAGGED),
    ("<tool_call>", _HERMES),
    ("[TOOL_CALLS]", _MISTRAL),
    ("<|python_tag|>", _LLAMA),
    ("Environment: ipython", _LLAMA),
)
"""What is in the template, and what that means; the first one counts."""
