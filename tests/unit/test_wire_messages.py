"""Messages: what goes out comes back, and nothing else is let in."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.base.errors import ProtocolError
from shoal.base.limits import DETAIL_CHARS_MAX, HEADER_BYTES_MAX, HOPS_MAX
from shoal.wire.frames import check_sizes
from shoal.wire.messages import (
    Entry,
    Error,
    Hello,
    Hop,
    Ping,
    RouteBody,
    Rows,
    decode,
    decode_route_body,
    encode,
    split_rows,
)
from tests.unit.wire_cases import MESSAGE_TYPES, any_message, structs

HELLO = Hello(1, "reef", "control")


def tag_of(cls: type[Any]) -> object:
    info = msgspec.inspect.type_info(cls)
    assert isinstance(info, msgspec.inspect.StructType)
    return info.tag


@given(any_message())
@settings(max_examples=300)
def test_a_message_survives_its_bytes(message: Any) -> None:
    assert decode(encode(message)) == message


@given(structs(RouteBody))
def test_a_route_body_survives_its_bytes(body: RouteBody) -> None:
    assert decode_route_body(encode(body)) == body


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error_or_a_message(garbage: bytes) -> None:
    for read in (decode, decode_route_body):
        with suppress(ProtocolError):
            read(garbage)


@given(message=any_message(), data=st.data())
def test_a_spoilt_message_is_a_protocol_error_or_a_message(message: Any, data: Any) -> None:
    raw = bytearray(encode(message))
    index = data.draw(st.integers(0, len(raw) - 1))
    raw[index] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        decode(bytes(raw))
    with pytest.raises(ProtocolError):
        decode(encode(message)[:index])


@pytest.mark.parametrize("cls", MESSAGE_TYPES, ids=lambda cls: cls.__name__)
def test_an_unknown_field_at_the_end_is_ignored(cls: type[Any]) -> None:
    """A newer peer may append fields."""

    @given(structs(cls))
    @settings(max_examples=5)
    def check(message: Any) -> None:
        fields = msgspec.msgpack.decode(encode(message))
        assert decode(msgspec.msgpack.encode([*fields, "new", 1])) == message

    check()


def test_tags_are_unique_numbers() -> None:
    tags = [tag_of(cls) for cls in MESSAGE_TYPES]
    assert all(isinstance(tag, int) for tag in tags)
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize(
    "value",
    [
        [],
        [1],
        [9],
        [9, -1],
        [9, 2**53 + 1],
        [9, "1"],
        [9, 1.5],
        [9, None],
        [255, 1],
        ["Ping", 1],
        {"call": 1},
        1,
        None,
        [1, 1, "x" * 257, "control"],
        [1, 1, "reef", "control", bytes(4_097)],
        [8, 0, "config", "x" * (DETAIL_CHARS_MAX + 1)],
        [8, 0, "config", "", float("nan")],
        [8, 0, "config", "", float("inf")],
        [8, 0, "config", "", -1.0],
        [4, bytes(15)],
        [4, bytes(17)],
        [25, []],
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_message(value: Any) -> None:
    with pytest.raises(ProtocolError, match="malformed message"):
        decode(msgspec.msgpack.encode(value))


def test_bytes_behind_a_message_are_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(encode(Ping(1)) + b"\x00")
    with pytest.raises(ProtocolError):
        decode(b"")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(b"\x92\x09" + b"\x91" * 100_000)


def test_text_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(encode(HELLO).replace(b"reef", b"\xff\xfe\xfd\xfc"))


def hop(index: int) -> Hop:
    return Hop(bytes(32), index, index + 1, "bfloat16")


def body(hops: list[Hop]) -> bytes:
    return encode(RouteBody(bytes(32), bytes(16), 1, "model", 1, hops))


def test_a_route_has_one_hop_to_the_limit() -> None:
    assert len(decode_route_body(body([hop(i) for i in range(HOPS_MAX)])).hops) == HOPS_MAX
    for hops in ([], [hop(i) for i in range(HOPS_MAX + 1)]):
        with pytest.raises(ProtocolError, match="malformed route"):
            decode_route_body(body(hops))


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_a_header_may_be_any_buffer(view: Any) -> None:
    assert decode(view(encode(HELLO))) == HELLO


def test_the_longest_error_fits_a_frame() -> None:
    check_sizes(len(encode(Error(0, "x" * 256, "\U0001f41f" * DETAIL_CHARS_MAX))), 0)
    assert HEADER_BYTES_MAX > 4 * DETAIL_CHARS_MAX


# --- rows ---------------------------------------------------------------------


@given(st.lists(structs(Entry), min_size=1, max_size=4), st.lists(st.binary(max_size=30)))
def test_rows_are_cut_where_their_entries_say(entries: list[Entry], parts: list[bytes]) -> None:
    parts = (parts + [b""] * len(entries))[: len(entries)]
    sized = [
        msgspec.structs.replace(entry, payload_bytes=len(part))
        for entry, part in zip(entries, parts, strict=True)
    ]
    payload = b"".join(parts)
    cut = split_rows(Rows(sized), payload)
    assert [(entry, bytes(part)) for entry, part in cut] == list(zip(sized, parts, strict=True))


@pytest.mark.parametrize("payload_bytes", [0, 9, 11])
def test_rows_that_do_not_add_up_are_refused(payload_bytes: int) -> None:
    @given(structs(Entry))
    @settings(max_examples=3)
    def check(entry: Entry) -> None:
        rows = Rows([msgspec.structs.replace(entry, payload_bytes=10)])
        with pytest.raises(ProtocolError, match="10 bytes"):
            split_rows(rows, bytes(payload_bytes))

    check()
