"""On which line of a TOML text each key stands: tomllib does not tell.

Only for texts that tomllib has read. A key inside an inline table or array has no line of
its own here: ask for what it is in (`line_of`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

Path = tuple[str | int, ...]
"""Keys and places in arrays of tables, from the top."""

_WORD: Final = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED: Final = rf"{_WORD}(?:\s*\.\s*{_WORD})*"
_HEADER: Final = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]")
_KEY: Final = re.compile(rf"\s*({_DOTTED})\s*=")
_PIECE: Final = re.compile(r'"""|\'\'\'|"(?:\\.|[^"\\])*"|\'[^\']*\'|[\[\]{}#]')


def key_lines(text: str) -> dict[Path, int]:
    """The line, from 1 on, of each table and key."""
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    value = _Value()
    for number, line in enumerate(text.splitlines(), 1):
        if value.is_open:
            value.read(line)
            continue
        header, key = _HEADER.match(line), _KEY.match(line)
        if header is not None:
            table = _table(_words(header[2]), counts, is_new=header[1] == "[[")
            if header[1] == "[[":
                found.setdefault(table[:-1], number)
            found.setdefault(table, number)
        elif key is not None:
            path = (*table, *_words(key[1]))
            for length in range(len(table) + 1, len(path) + 1):
                found.setdefault(path[:length], number)
            value.read(line[key.end() :])
    return found


def line_of(lines: Mapping[Path, int], path: Sequence[str | int]) -> int:
    """The line of a key, or of the nearest thing around it that has one."""
    for length in range(len(path), 0, -1):
        if tuple(path[:length]) in lines:
            return lines[tuple(path[:length])]
    return 1


def _words(dotted: str) -> Path:
    return tuple(word.strip("\"'") for word in re.findall(_WORD, dotted))


def _table(words: Path, counts: dict[Path, int], *, is_new: bool) -> Path:
    """Where a header leads: of arrays of tables to the last one, or to a new one."""
    path: Path = ()
    for place, word in enumerate(words):
        path = (*path, word)
        is_last = place == len(words) - 1
        if is_last and is_new:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = (*path, counts[path])
    return path


class _Value:
    """Follows one value over its lines: brackets and long texts."""

    def __init__(self) -> None:
        self.depth = 0
        self.quote = ""

    @property
    def is_open(self) -> bool:
        """Whether the next line still belongs to it."""
        return self.depth > 0 or bool(self.quote)

    def read(self, text: str) -> None:
        """Go on with a line."""
        position = 0
        while position < len(text):
            if self.quote:
                end = text.find(self.quote, position)
                if end < 0:
                    return
                position, self.quote = end + 3, ""
                continue
            piece = _PIECE.search(text, position)
            if piece is None or piece[0] == "#":
                return
            position = piece.end()
            if piece[0] in ('"""', "'''"):
                self.quote = piece[0]
            elif piece[0] in ("[", "{"):
                self.depth += 1
            elif piece[0] in ("]", "}"):
                self.depth -= 1
