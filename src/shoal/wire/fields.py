"""The kinds of field that messages are made of, each with its range, and the messages' base."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shoal.base.content import CONTENT_BYTES
from shoal.base.ids import NONCE_BYTES, PEER_ID_BYTES, SESSION_ID_BYTES
from shoal.base.limits import DETAIL_CHARS_MAX, RECORD_BYTES_MAX, SESSION_TOKENS_MAX

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Block = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
Position = Annotated[int, msgspec.Meta(ge=0, le=SESSION_TOKENS_MAX)]
Peer = Annotated[bytes, msgspec.Meta(min_length=PEER_ID_BYTES, max_length=PEER_ID_BYTES)]
Session = Annotated[bytes, msgspec.Meta(min_length=SESSION_ID_BYTES, max_length=SESSION_ID_BYTES)]
Content = Annotated[bytes, msgspec.Meta(min_length=CONTENT_BYTES, max_length=CONTENT_BYTES)]
OptionalContent = Annotated[bytes, msgspec.Meta(max_length=CONTENT_BYTES)]
Nonce = Annotated[bytes, msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Detail = Annotated[str, msgspec.Meta(max_length=DETAIL_CHARS_MAX)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
RecordBytes = Annotated[bytes, msgspec.Meta(max_length=RECORD_BYTES_MAX)]


class WireMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all wire structs."""


class Coordinate(WireMessage, frozen=True):
    """A place in the space of round trips, in seconds. Two places are as far apart as their
    points, plus both heights; `error` is the relative error that the subject expects."""

    point: Annotated[
        list[Annotated[float, msgspec.Meta(ge=-10, le=10)]],
        msgspec.Meta(min_length=3, max_length=3),
    ]
    height: Annotated[float, msgspec.Meta(ge=0, le=10)]
    error: Annotated[float, msgspec.Meta(ge=0, le=10)]
