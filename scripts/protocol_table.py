#!/usr/bin/env python3
"""Renders the table of messages in docs/protocol.md from `shoal.wire.messages`.

`scripts/protocol_table.py` prints it, `--write` puts it into the document. A test fails
while the two differ, so a changed field is always a deliberate change of the spec.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import inspect as types

from shoal.wire import adapters, directory, gossip, head, messages, ring, training, weights
from shoal.wire.fields import WireMessage

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
BEGIN = "<!-- messages: begin (scripts/protocol_table.py --write) -->\n"
END = "<!-- messages: end -->\n"


def wire_structs() -> list[type[msgspec.Struct]]:
    """Every struct that travels, tagged messages first by tag, then their parts."""
    found = {
        value: None
        for module in (messages, directory, gossip, weights, adapters, head, training, ring)
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, WireMessage) and value is not WireMessage
    }
    return sorted(found, key=lambda cls: (_tag(cls) is None, _tag(cls) or 0))


def _tag(struct: type[msgspec.Struct]) -> int | None:
    tag = struct.__struct_config__.tag
    return tag if isinstance(tag, int) else None


def _bounds(low: float | None, high: float | None) -> str:
    if high is None:
        return ""
    if low == high:
        return f" {high}"
    return f" {low or 0}..{high if isinstance(high, int) else format(high, 'g')}"


def type_text(kind: types.Type) -> str:
    """A field's type and bounds in the words of the table."""
    match kind:
        case types.IntType(ge=0, le=top) if top == 2**53:
            return "count"
        case types.IntType():
            return "int" + _bounds(kind.ge, kind.le)
        case types.FloatType():
            return "float" + _bounds(kind.ge, kind.le)
        case types.BoolType():
            return "bool"
        case types.BytesType():
            return "bytes" + _bounds(kind.min_length, kind.max_length)
        case types.StrType():
            return "str" + _bounds(kind.min_length, kind.max_length)
        case types.LiteralType():
            return " or ".join(str(value) for value in kind.values)
        case types.StructType():
            return kind.cls.__name__
        case types.ListType():
            return f"list{_bounds(kind.min_length, kind.max_length)} of {type_text(kind.item_type)}"
        case types.TupleType():
            return f"({', '.join(type_text(item) for item in kind.item_types)})"
        case types.UnionType():
            return " or ".join(type_text(option) for option in kind.types)
        case types.NoneType():
            return "nil"
    raise TypeError(f"no words for {kind!r}: add a case to scripts/protocol_table.py")


def _fields(struct: type[msgspec.Struct]) -> Iterator[str]:
    info = types.type_info(struct)
    assert isinstance(info, types.StructType)
    for field in info.fields:
        default = ""
        if not field.required:
            value = [] if field.default is msgspec.NODEFAULT else field.default
            default = (
                f" = {value!r}".replace("None", "nil").replace("b''", '""').replace("''", '""')
            )
        yield f"{field.name}: {type_text(field.type)}{default}"


def render() -> str:
    """The table in Markdown: one row per struct, fields in wire order."""
    lines = ["| tag | message | fields, in order |", "|---|---|---|"]
    for struct in wire_structs():
        tag = _tag(struct)
        shown = "part" if tag is None else str(tag)
        lines.append(f"| {shown} | {struct.__name__} | {'; '.join(_fields(struct))} |")
    return "\n".join(lines) + "\n"


def documented(text: str) -> str:
    """The table as docs/protocol.md has it."""
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> int:
    """Print the table, or write it with `--write`."""
    if sys.argv[1:] != ["--write"]:
        print(render(), end="")
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(
        text.replace(BEGIN + documented(text) + END, BEGIN + render() + END), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
