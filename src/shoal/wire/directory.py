"""Messages about who is here and how full: records by request, and a server's load."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shoal.base.ids import PEER_ID_BYTES
from shoal.base.limits import RECORDS_MAX
from shoal.wire.fields import Count, RecordBytes, Seconds, WireMessage


class GetRecords(WireMessage, tag=11, frozen=True):
    """Asks for the records the peer knows, of peers whose id is above `after`."""

    call: Count
    after: Annotated[bytes, msgspec.Meta(max_length=PEER_ID_BYTES)] = b""


class Records(WireMessage, tag=12, frozen=True):
    """Signed records, as their subjects signed them, in the order of peer ids.

    Answers GetRecords; ask again `after` the last one if there are more. Also answers
    Publish, with the records that the sender should know because its own are older, and
    WantRecords. On a gossip stream a call that is not 0 asks for a Taken. `ages_s` says for each
    how much of its life is over (0 where the list ends).
    """

    call: Count
    records: Annotated[list[RecordBytes], msgspec.Meta(max_length=RECORDS_MAX)]
    has_more: bool = False
    ages_s: Annotated[list[Seconds], msgspec.Meta(max_length=RECORDS_MAX)] = msgspec.field(
        default_factory=list
    )


class Publish(WireMessage, tag=13, frozen=True):
    """Hands over records: the sender's own first."""

    call: Count
    records: Annotated[list[RecordBytes], msgspec.Meta(max_length=RECORDS_MAX)]


class GetLoad(WireMessage, tag=14, frozen=True):
    """Asks for the volatile facts that records don't carry."""

    call: Count


class Load(WireMessage, tag=15, frozen=True):
    """How full a server is right now; `room_in_s`: when a new session should find room."""

    call: Count
    cache_tokens: Count
    free_tokens: Count
    sessions: Count
    queued_tokens: Count
    iteration_estimate_s: Seconds
    iterations: Count = 0
    decode_s_per_block: Seconds = 0.0
    room_in_s: Seconds = 0.0
