"""What was said in a chat: messages, settings, and the file that keeps them. No I/O but that.

A chat file is plain JSON:

    {"format": "shoal-chat-1", "system": "Be brief." or null,
     "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", ...}, ...]}
"""

from __future__ import annotations

import difflib
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from shoal.base.errors import ConfigError

FORMAT: Final = "shoal-chat-1"
FILE_BYTES_MAX: Final = 16 << 20
"""Far beyond any model's context; a larger file is no chat."""

USER: Final = "user"
ASSISTANT: Final = "assistant"
SYSTEM: Final = "system"

_UNSET: Final = ("none", "off", "default")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question and its answer."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """A chat so far."""

    system: str | None = None
    turns: tuple[Turn, ...] = ()

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """All messages as chat templates want them, with a new question at the end."""
        found = [] if self.system is None else [{"role": SYSTEM, "content": self.system}]
        for turn in self.turns:
            found.append({"role": USER, "content": turn.user})
            found.append({"role": ASSISTANT, "content": turn.assistant})
        if question is not None:
            found.append({"role": USER, "content": question})
        return found

    def answered(self, question: str, answer: str) -> Transcript:
        """With one more turn."""
        return replace(self, turns=(*self.turns, Turn(user=question, assistant=answer)))

    def without_last(self) -> Transcript:
        """With one turn less.

        Raises:
            ConfigError: there is none.
        """
        if not self.turns:
            raise ConfigError("nothing was said yet")
        return replace(self, turns=self.turns[:-1])


def save_transcript(transcript: Transcript, path: Path) -> None:
    """Write a chat file, whole or not at all; only another chat file is overwritten.

    Raises:
        ConfigError: something else is there, or it can't be written.
    """
    if path.exists():
        try:
            load_transcript(path)
        except ConfigError as error:
            raise ConfigError(f"{path} is there and is no chat; choose another name") from error
    content = {
        "format": FORMAT,
        "system": transcript.system,
        "messages": replace(transcript, system=None).messages(),
    }
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConfigError(f"can't write {path}: {error}") from error


def load_transcript(path: Path) -> Transcript:
    """Read a chat file.

    Raises:
        ConfigError: not there, not readable, or no chat file; says what is wrong.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{path} is larger than {FILE_BYTES_MAX} bytes: no chat file")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"can't read a chat from {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f'{path} is no chat file: it must be an object with "format": "{FORMAT}"')
    system, messages = content.get("system"), content.get("messages")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise ConfigError(f"{path}: system must be a text or null, messages a list")
    texts = [_content(message, index, path) for index, message in enumerate(messages)]
    if len(texts) % 2:
        raise ConfigError(f"{path}: the last message has no answer")
    pairs = zip(texts[::2], texts[1::2], strict=True)
    turns = tuple(Turn(user=user, assistant=assistant) for user, assistant in pairs)
    return Transcript(system=system, turns=turns)


def _content(message: Any, index: int, path: Path) -> str:
    role = (USER, ASSISTANT)[index % 2]
    if not isinstance(message, dict) or message.get("role") != role:
        raise ConfigError(f"{path}: message {index + 1} must have the role {role}")
    text = message.get("content")
    if not isinstance(text, str):
        raise ConfigError(f"{path}: the content of message {index + 1} must be a text")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSettings:
    """How answers are chosen; `/set` changes them."""

    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    """None: another one for each answer."""
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, not {self.top_k}")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")

    def changed(self, text: str) -> ChatSettings:
        """With `name=value`; `none` where a setting may be absent.

        Raises:
            ConfigError: no such setting, or not such a value.
        """
        name, separator, value = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        names = [field.name for field in fields(self)]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"no setting {name!r}; {hint}")
        if not separator or not value:
            raise ConfigError(f"write /set {name}=VALUE")
        if value.lower() in _UNSET and name in ("top_p", "top_k", "seed"):
            return self._with(name, None)
        kind = float if name in ("temperature", "top_p") else int
        try:
            number = kind(value)
        except ValueError as error:
            raise ConfigError(f"{name} must be a number, not {value!r}") from error
        return self._with(name, number)

    def _with(self, name: str, value: Any) -> ChatSettings:
        return replace(self, **{name: value})

    def __str__(self) -> str:
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ", ".join(f"{name}={'none' if value is None else value}" for name, value in pairs)
