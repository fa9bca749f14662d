"""Hypothesis strategies for every wire struct, read off the structs themselves."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from hypothesis import strategies as st

from shoal.wire import messages

MESSAGE_TYPES: tuple[type[Any], ...] = get_args(messages.Message)

LIST_MAX = 4
"""Lists and strings stay short: their limits are tested one by one."""

TEXT_MAX = 20
BYTES_MAX = 64


def values(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Values that a field of this type takes."""
    match kind:
        case msgspec.inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case msgspec.inspect.FloatType(ge=low, le=high):
            return st.floats(low, high, allow_nan=False)
        case msgspec.inspect.BytesType(min_length=low, max_length=high):
            return st.binary(min_size=low or 0, max_size=max(low or 0, min(high or 0, BYTES_MAX)))
        case msgspec.inspect.StrType(max_length=high):
            return st.text(max_size=min(high or 0, TEXT_MAX))
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.LiteralType(values=options):
            return st.sampled_from(options)
        case msgspec.inspect.UnionType(types=options):
            return st.one_of([values(option) for option in options])
        case msgspec.inspect.ListType(item_type=item, min_length=low, max_length=high):
            size = min(high or LIST_MAX, LIST_MAX)
            return st.lists(values(item), min_size=low or 0, max_size=size)
        case msgspec.inspect.TupleType(item_types=items):
            return st.tuples(*map(values, items))
        case msgspec.inspect.StructType(cls=cls):
            return structs(cls)
    raise TypeError(f"no values known for {kind}: add a case")


def structs(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Valid values of one wire struct."""
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    return st.builds(cls, **{field.name: values(field.type) for field in info.fields})


def any_message() -> st.SearchStrategy[Any]:
    """Any valid message."""
    return st.one_of([structs(cls) for cls in MESSAGE_TYPES])
