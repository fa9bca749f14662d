"""Frames: `u32 header length | u32 payload length | header | payload`, little-endian.

The header is one msgpack message (`messages.py`); the payload is raw tensor bytes
and travels without a copy. Lengths are checked before memory is taken.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.base.errors import MessageTooLarge
from shoal.base.limits import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX

Buffer = bytes | bytearray | memoryview

PREFIX = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Frame:
    """One message as it travels: an encoded header and its raw payload."""

    header: Buffer
    payload: Buffer = b""


def check_sizes(header_bytes: int, payload_bytes: int) -> None:
    """Refuse a frame over the limits.

    Raises:
        MessageTooLarge: the header or the payload is over its limit.
    """
    if header_bytes > HEADER_BYTES_MAX:
        raise MessageTooLarge(f"header of {header_bytes} bytes (limit {HEADER_BYTES_MAX})")
    if payload_bytes > PAYLOAD_BYTES_MAX:
        raise MessageTooLarge(f"payload of {payload_bytes} bytes (limit {PAYLOAD_BYTES_MAX})")


def encode_frame(header: Buffer, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """The buffers to write, in order; payload buffers are passed on uncopied.

    Raises:
        MessageTooLarge: over the limits; nothing was written.
    """
    payload_bytes = sum(memoryview(part).nbytes for part in payload)
    check_sizes(len(header), payload_bytes)
    return [PREFIX.pack(len(header), payload_bytes) + bytes(header), *payload]


class FrameParser:
    """Frames out of an arbitrary sequence of byte chunks.

    Feed it what arrives; it never holds more than one frame over the limits' sum.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def is_mid_frame(self) -> bool:
        """Whether bytes of an unfinished frame are held."""
        return bool(self._buffer)

    def feed(self, chunk: Buffer) -> Iterator[Frame]:
        """Every frame that `chunk` completes.

        Raises:
            MessageTooLarge: a prefix announces more than the limits allow.
        """
        self._buffer += chunk
        offset = 0
        try:
            while len(self._buffer) - offset >= PREFIX.size:
                header_bytes, payload_bytes = PREFIX.unpack_from(self._buffer, offset)
                check_sizes(header_bytes, payload_bytes)
                start = offset + PREFIX.size
                middle = start + header_bytes
                end = middle + payload_bytes
                if len(self._buffer) < end:
                    break
                frame = Frame(
                    bytes(self._buffer[start:middle]), memoryview(bytes(self._buffer[middle:end]))
                )
                offset = end
                yield frame
        finally:
            del self._buffer[:offset]
