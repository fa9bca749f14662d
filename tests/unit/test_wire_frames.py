"""Frames out of any cut of the byte stream; limits before memory."""

from __future__ import annotations

import array
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import BadInput, MessageTooLarge, ProtocolError
from shoal.base.limits import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX
from shoal.wire.frames import PREFIX, Frame, FrameParser, check_sizes, encode_frame
from shoal.wire.tensors import ITEM_BYTES, check_payload, row_bytes

FRAMES = st.lists(st.tuples(st.binary(max_size=50), st.binary(max_size=200)), max_size=6)


def stream_of(frames: list[tuple[bytes, bytes]]) -> bytes:
    buffers = [part for header, payload in frames for part in encode_frame(header, [payload])]
    return b"".join(bytes(part) for part in buffers)


def plain(frames: list[Frame]) -> list[tuple[bytes, bytes]]:
    return [(bytes(frame.header), bytes(frame.payload)) for frame in frames]


@given(frames=FRAMES, data=st.data())
def test_frames_survive_any_cut(frames: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    stream = stream_of(frames)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=10).map(sorted))
    parser = FrameParser()
    got: list[Frame] = []
    for start, end in zip([0, *places], [*places, len(stream)], strict=True):
        got.extend(parser.feed(stream[start:end]))
    assert plain(got) == frames
    assert not parser.is_mid_frame


def test_byte_by_byte() -> None:
    frames = [(b"head", b"payload"), (b"", b""), (b"x", b"")]
    parser = FrameParser()
    got: list[Frame] = []
    for index, byte in enumerate(stream_of(frames)):
        got.extend(parser.feed(bytes([byte])))
        assert parser.is_mid_frame == (index not in (18, 26, 35))
    assert plain(got) == frames


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview])
def test_a_chunk_may_be_any_buffer_and_is_not_kept(view: type) -> None:
    chunk = bytearray(stream_of([(b"head", b"payload")]))
    (frame,) = FrameParser().feed(view(chunk))
    chunk[:] = bytes(len(chunk))
    assert plain([frame]) == [(b"head", b"payload")]


def test_frames_do_not_change_when_more_arrives() -> None:
    parser = FrameParser()
    (first,) = parser.feed(stream_of([(b"one", b"1" * 100)]))
    (second,) = parser.feed(stream_of([(b"two", b"2" * 100)]))
    assert plain([first, second]) == [(b"one", b"1" * 100), (b"two", b"2" * 100)]


@given(st.lists(st.binary(max_size=100), max_size=10))
def test_garbage_is_frames_or_a_protocol_error(chunks: list[bytes]) -> None:
    parser = FrameParser()
    with suppress(ProtocolError):
        for chunk in chunks:
            list(parser.feed(chunk))


@pytest.mark.parametrize(
    ("header_bytes", "payload_bytes", "named"),
    [
        (HEADER_BYTES_MAX + 1, 0, "header"),
        (0, PAYLOAD_BYTES_MAX + 1, "payload"),
        (2**32 - 1, 2**32 - 1, "header"),
    ],
)
def test_a_prefix_over_the_limits_is_refused_at_once(
    header_bytes: int, payload_bytes: int, named: str
) -> None:
    with pytest.raises(MessageTooLarge, match=named):
        check_sizes(header_bytes, payload_bytes)
    parser = FrameParser()
    good = stream_of([(b"good", b"")])
    got: list[Frame] = []
    got.extend(parser.feed(good))
    with pytest.raises(MessageTooLarge, match=named):
        got.extend(parser.feed(good + PREFIX.pack(header_bytes, payload_bytes)))
    assert plain(got) == [(b"good", b"")] * 2


def test_the_limits_themselves_pass() -> None:
    check_sizes(HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX)
    frames = [(bytes(HEADER_BYTES_MAX), b"x")]
    assert plain(list(FrameParser().feed(stream_of(frames)))) == frames


def test_a_frame_over_the_limits_is_not_encoded() -> None:
    with pytest.raises(MessageTooLarge):
        encode_frame(bytes(HEADER_BYTES_MAX + 1))
    with pytest.raises(MessageTooLarge):
        encode_frame(b"", [bytes(PAYLOAD_BYTES_MAX), b"x"])


def test_payload_is_not_copied_and_counted_in_bytes() -> None:
    floats = array.array("f", [1.0, 2.0])
    prefix, view = encode_frame(b"h", [memoryview(floats)])
    assert bytes(prefix) == PREFIX.pack(1, 8) + b"h"
    assert isinstance(view, memoryview)
    assert view.obj is floats


# --- tensor bytes -------------------------------------------------------------


@pytest.mark.parametrize(("encoding", "item"), ITEM_BYTES.items())
def test_rows_have_a_fixed_size(encoding: str, item: int) -> None:
    assert row_bytes(encoding, 10) == 10 * item
    check_payload(encoding, 10, 3, 30 * item)
    with pytest.raises(BadInput, match=f"are {30 * item} bytes"):
        check_payload(encoding, 10, 3, 30 * item + 1)


def test_an_unknown_encoding_is_named() -> None:
    with pytest.raises(BadInput, match="'int3'"):
        row_bytes("int3", 10)
