"""Tables of a file whose every key is asked for: nonsense is told with file, line and key."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from shoal.base.errors import ConfigError, ShoalError
from shoal.cli.plan_lines import Path as KeyPath
from shoal.cli.plan_lines import key_lines, line_of
from shoal.cli.sizes import parse_size

FILE_BYTES_MAX: Final = 1 << 20
"""Thousands of servers; a larger file is some other file."""

_RATE_UNITS: Final = {"bit": 1 / 8, "b": 1.0}
_RATE_FACTORS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}

SLIP: Final = 0.8
"""Two words as alike as this are one word and a slip; less, and they may be two keys."""

_MISSING: Final = object()
Word = TypeVar("Word", bound=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table of a file. Ask for every key, then call `done`."""

    file: Path
    lines: Mapping[KeyPath, int]
    path: KeyPath
    content: Mapping[str, Any]
    asked: set[str] = field(default_factory=set)

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def fail(self, text: str, key: str | None = None) -> ConfigError:
        """The error for a key, or for the table itself."""
        path = self.path if key is None else (*self.path, key)
        name = _path_text(path)
        where = f"{self.file}, line {line_of(self.lines, path)}"
        return ConfigError(f"{where}: {name}: {text}" if name else f"{where}: {text}")

    def checked(self, key: str, error: ShoalError) -> ConfigError:
        """An error of ours, said of this key."""
        return self.fail(error.detail, key)

    def done(self) -> None:
        """See that nothing else is in the table.

        Raises:
            ConfigError: an unknown key; names the nearest.
        """
        for key in self.content:
            if key not in self.asked:
                near = difflib.get_close_matches(key, sorted(self.asked), n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(self.asked)}"
                raise self.fail(f"unknown key; {hint}", key)

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e15
    ) -> float:
        """A number within [low, high]; without a default it has to be there."""
        value = self._get(key, _MISSING if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(f"{value!r} is no number", key)
        if not low <= value <= high:  # says no to nan as well
            raise self.fail(f"{value!r} is not between {low:g} and {high:g}", key)
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.fail(f"{value:g} is not above 0", key)
        return value

    def integer(
        self, key: str, default: int | None = None, *, low: int = 1, high: int = 10**12
    ) -> int:
        """A whole number within [low, high]."""
        value = self._get(key, _MISSING if default is None else default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(f"{value!r} is no whole number", key)
        if not low <= value <= high:
            raise self.fail(f"{value} is not between {low} and {high}", key)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text that is not empty."""
        value = self._get(key, _MISSING if default is None else default)
        if not isinstance(value, str) or (not value.strip() and value != default):
            raise self.fail(f"{value!r} is no text", key)
        return value

    def choice(self, key: str, words: Sequence[Word], default: Word | None = None) -> Word:
        """One of these words."""
        text = self.text(key, default)
        found = next((word for word in words if word == text), None)
        if found is None:
            near = difflib.get_close_matches(text, words, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise self.fail(f"{text!r} is unknown; {hint}choose {', '.join(words)}", key)
        return found

    def size(self, key: str) -> int:
        """Bytes: `"12GB"`."""
        value = self._get(key, _MISSING)
        if not isinstance(value, str):
            raise self.fail(f'{value!r} is no size; write one such as "12GB"', key)
        try:
            size = parse_size(value, key)
        except ConfigError as error:
            raise self.fail(f'{value!r} is no size; write one such as "12GB"', key) from error
        if not 1 <= size <= 10**18:
            raise self.fail(f"{value!r} is not between 1 byte and 10^18 bytes", key)
        return size

    def rate(self, key: str, default: float | None = None) -> float:
        """Bytes per second: `"100Mbit/s"` or `"936GB/s"`."""
        value = self._get(key, _MISSING if default is None else default)
        if default is not None and key not in self.content:
            return default
        match = None
        if isinstance(value, str):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(bit|b)/s", value.strip().lower())
        if match is None:
            text = f'{value!r} is no rate; write one such as "100Mbit/s" or "936GB/s"'
            raise self.fail(text, key)
        rate = float(match[1]) * _RATE_FACTORS[match[2]] * _RATE_UNITS[match[3]]
        if not 0 < rate <= 1e18:
            raise self.fail(f"{value!r} is not above 0", key)
        return rate

    def numbers(self, key: str, count: int) -> list[float] | None:
        """So many numbers, or None if the key is missing."""
        value = self._get(key, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(f"{value!r} is no list of {count} numbers", key)
        for one in value:
            if isinstance(one, bool) or not isinstance(one, int | float) or not abs(one) <= 1e15:
                raise self.fail(f"{one!r} is no number", key)
        return [float(one) for one in value]

    def words(self, key: str, count: int) -> list[str]:
        """So many texts."""
        value = self._get(key, _MISSING)
        if not isinstance(value, list) or len(value) != count:
            raise self.fail(f"{value!r} is no list of {count} names", key)
        if not all(isinstance(one, str) for one in value):
            raise self.fail(f"{value!r} is no list of names", key)
        return value

    def points(self, key: str) -> tuple[tuple[int, float], ...]:
        """A number, or numbers by batch as `{ 1 = 2.0, 8 = 2.9 }`; all above 0."""
        value = self._get(key, _MISSING)
        if not isinstance(value, dict):
            return ((1, self.positive(key)),)
        inner = self._inner(key, value)
        found = []
        for word in value:
            if not re.fullmatch(r"[1-9]\d{0,5}", word):
                raise inner.fail("a batch is a whole number from 1 on", word)
            found.append((int(word), inner.positive(word)))
        if not found:
            raise self.fail("give a time, or times by batch", key)
        return tuple(sorted(found))

    def table(self, key: str) -> Table:
        """A table inside; an empty one if it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.fail(f"is a table: write [{_path_text((*self.path, key))}]", key)
        return self._inner(key, value)

    def tables(self, key: str) -> list[Table]:
        """An array of tables; empty if it is missing."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise self.fail(f"is a list of tables: write [[{_path_text((*self.path, key))}]]", key)
        return [self._inner(key, one, index) for index, one in enumerate(value)]

    def _inner(self, key: str, content: Mapping[str, Any], index: int | None = None) -> Table:
        path = (*self.path, key) if index is None else (*self.path, key, index)
        return Table(file=self.file, lines=self.lines, path=path, content=content)

    def _get(self, key: str, default: Any) -> Any:
        self.asked.add(key)
        if key in self.content:
            return self.content[key]
        if default is _MISSING:
            others = [word for word in self.content if word not in self.asked]
            for near in difflib.get_close_matches(key, others, n=1, cutoff=SLIP):
                raise self.fail(f"unknown key; did you mean {key}?", near)
            raise self.fail(f"{key} is missing")
        return default


def read_table(path: Path) -> Table:
    """The top of a file.

    Raises:
        ConfigError: not readable, or not TOML.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise ConfigError(f"{path} is larger than {FILE_BYTES_MAX} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    return parse_table(text, path)


def parse_table(text: str, path: Path) -> Table:
    """The top of a text that was read from `path`.

    Raises:
        ConfigError: not TOML.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    return Table(file=path, lines=key_lines(text), path=(), content=content)


def _path_text(path: KeyPath) -> str:
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part + 1}]"
        else:
            text += f".{part}" if text else part
    return text
