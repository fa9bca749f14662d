"""Messages of gossip streams: who is here, and who has fallen silent."""

from __future__ import annotations

from typing import Annotated

import msgspec

from shoal.base.limits import DIGEST_BUCKETS, RECORDS_MAX
from shoal.wire.fields import Coordinate, Count, Peer, WireMessage


class RecordName(WireMessage, frozen=True):
    """Names one record: whose it is, and its sequence (boot, counter)."""

    peer: Peer
    boot_ms: Count
    counter: Count


class Beat(WireMessage, tag=30, frozen=True):
    """A neighbour that had nothing else to say for GOSSIP_BEAT_S lives.

    An `ask` other than 0 is answered at once by a Beat that has it as `echo`: the time in
    between is a round trip.
    """

    ask: Count = 0
    echo: Count = 0
    coordinate: Coordinate | None = None
    """Of the sender, beside an echo."""


class Digest(WireMessage, tag=31, frozen=True):
    """What the sender holds, as 8 bytes for each of DIGEST_BUCKETS buckets.

    A bucket is the last byte of the peer id modulo their number. Its 8 bytes are the
    xor of BLAKE2b-64 over (peer id, u64 boot, u64 counter, little-endian) of all its
    records. Answered by an Offer of the buckets that differ, if any does.
    """

    hashes: Annotated[
        bytes, msgspec.Meta(min_length=8 * DIGEST_BUCKETS, max_length=8 * DIGEST_BUCKETS)
    ]


class Offer(WireMessage, tag=32, frozen=True):
    """Records that the sender holds: news, or everything in the named `buckets`.

    The receiver asks for what it lacks by WantRecords; of the named buckets it offers in turn
    what it knows better.
    """

    names: Annotated[list[RecordName], msgspec.Meta(max_length=RECORDS_MAX)]
    buckets: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BUCKETS)] = b""


class WantRecords(WireMessage, tag=33, frozen=True):
    """Asks for the records of these peers; answered by Records with call 0."""

    peers: Annotated[list[Peer], msgspec.Meta(max_length=RECORDS_MAX)]


class Suspects(WireMessage, tag=34, frozen=True):
    """A neighbour of these peers can't reach them. A later record of theirs refutes it."""

    names: Annotated[list[RecordName], msgspec.Meta(max_length=RECORDS_MAX)]


class Taken(WireMessage, tag=35, frozen=True):
    """The Records with this call arrived and were looked at."""

    call: Count


class Part(WireMessage, tag=36, frozen=True):
    """The sender ends this stream and lives on: nobody is to be suspected."""
