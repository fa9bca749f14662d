"""Messages of weights streams: what a peer has of a model, and pieces of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from shoal.base.limits import (
    FILES_BYTES_MAX,
    FILES_MAX,
    MANIFEST_BYTES_MAX,
    PIECE_BYTES_MAX,
    TENSORS_MAX,
)
from shoal.wire.fields import Content, Count, Name, WireMessage


class FileEntry(WireMessage, frozen=True):
    """A file that belongs to a model beside its weights: a tokenizer, a generation config."""

    name: Name
    num_bytes: Annotated[int, msgspec.Meta(ge=0, le=FILES_BYTES_MAX)]
    content: Content


class GetHoldings(WireMessage, tag=40, frozen=True):
    """Asks what the peer has of a model. `model` is its name as 16 bytes."""

    call: Count
    model: Content


class Holdings(WireMessage, tag=41, frozen=True):
    """What the peer has of a model.

    Bit i of `held` (the lowest of a byte first) says that it has tensor i of the manifest;
    bits behind the end are 0.
    """

    call: Count
    manifest_bytes: Annotated[int, msgspec.Meta(ge=0, le=MANIFEST_BYTES_MAX)]
    held: Annotated[bytes, msgspec.Meta(max_length=TENSORS_MAX // 8)]
    files: Annotated[list[FileEntry], msgspec.Meta(max_length=FILES_MAX)] = msgspec.field(
        default_factory=list
    )


class GetPiece(WireMessage, tag=42, frozen=True):
    """Asks for `count` bytes from `offset` of what has this hash: a tensor, a file, a manifest."""

    call: Count
    content: Content
    offset: Count
    count: Annotated[int, msgspec.Meta(ge=1, le=PIECE_BYTES_MAX)]


class Piece(WireMessage, tag=43, frozen=True):
    """The bytes asked for are the frame's payload: all of them, never fewer."""

    call: Count


def pack_held(held: Sequence[bool]) -> bytes:
    """`Holdings.held`: bit i is whether tensor i is held."""
    packed = bytearray((len(held) + 7) // 8)
    for index, is_held in enumerate(held):
        packed[index // 8] |= is_held << (index % 8)
    return bytes(packed)


def unpack_held(packed: bytes) -> frozenset[int]:
    """The numbers of the tensors that are held."""
    return frozenset(
        8 * place + bit for place, byte in enumerate(packed) for bit in range(8) if byte >> bit & 1
    )
