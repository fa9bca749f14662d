"""A record: what a server says about itself, signed, so that anybody may pass it on.

On the wire a record is an envelope of two byte strings, the packed body and its
signature. Whoever takes a record checks it with `open_record`, wherever it came from;
what is handed on is the envelope as its subject signed it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Final, Literal

import msgspec

from shoal.base.errors import ConfigError, MessageTooLarge, PeerMisbehaved, ProtocolError
from shoal.base.ids import PeerId, short
from shoal.base.limits import RECORD_BYTES_MAX, RECORD_TTL_S, SESSION_TOKENS_MAX
from shoal.base.spans import Span
from shoal.discovery.coordinates import from_wire
from shoal.net.address import parse_address
from shoal.net.identity import RECORD, Identity, verify
from shoal.plan.view import Intent, ServerView
from shoal.wire.fields import Block, Content, Coordinate, Count, Name, Peer, Seconds, Signature

ADDRESSES_MAX: Final = 16
"""Addresses in one record: several networks, both families, a relay or two."""

ADDRESS_CHARS_MAX: Final = 512
"""Characters of one address: 52 of peer id, 255 of host name, and room."""

ENCODINGS_MAX: Final = 32
"""Encodings that one server may speak; a few exist."""

ADAPTERS_MAX: Final = 64
"""Adapters that one server announces: 20 to 100 bytes each, well within a record."""

DECODE_POINTS_MAX: Final = 8
"""Batches whose decode time a record tells; between them it is a straight line."""

HIDDEN_SIZE_MAX: Final = 1 << 20
"""Values per row; the widest models have 20 thousand."""

BYTES_PER_S_MAX: Final = 1e12
"""Faster than any network."""

RecordState = Literal["joining", "online", "draining", "offline"]
"""`offline` is a tombstone: the peer says that it has gone."""

BatchSize = Annotated[int, msgspec.Meta(ge=1, le=65_536)]
"""Rows of one pass."""

AddressText = Annotated[str, msgspec.Meta(max_length=ADDRESS_CHARS_MAX)]


class MoveIntent(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A server wants to host [start, end) instead of what it hosts now."""

    ticket: Count
    """Who has the lower one may leave first; more than any that the server knew of."""
    start: Block
    end: Block
    is_going: bool = False
    """It has decided and loads the blocks; the old ones can't be counted on."""


class Adapter(msgspec.Struct, frozen=True, array_like=True):
    """A LoRA adapter: what people call it, and the hash that is its name."""

    label: Name
    name: Content


class Record(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One server's statement about itself. New fields are appended, with a default."""

    peer: Peer
    swarm: Name
    boot_ms: Count
    """When the server started, Unix time by its own clock: only ever compared with itself."""
    counter: Count
    """Rises with every record since the start."""
    ttl_s: Seconds
    """Valid this long after receipt, at most RECORD_TTL_S."""
    state: RecordState
    addresses: Annotated[list[AddressText], msgspec.Meta(max_length=ADDRESSES_MAX)]
    model: Name
    """The hash of the model's manifest."""
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=65_535)]
    """Blocks of the whole model."""
    hidden_size: Annotated[int, msgspec.Meta(ge=1, le=HIDDEN_SIZE_MAX)]
    start: Block
    end: Block
    numerics: Name = ""
    is_exact: bool = False
    encodings: Annotated[list[Name], msgspec.Meta(max_length=ENCODINGS_MAX)] = []
    cache_tokens: Count = 0
    decode_s_per_block: Seconds = 0.0
    """One decode row through one block at batch 1; 0: not measured."""
    prefill_s_per_block_token: Seconds = 0.0
    version: Name = ""
    """Of the server's software; for people."""
    session_tokens_max: Annotated[int, msgspec.Meta(ge=1, le=SESSION_TOKENS_MAX)] = (
        SESSION_TOKENS_MAX
    )
    """The longest session that the model itself supports."""
    intent: MoveIntent | None = None
    """None: the server stays where it is."""
    decode_s_by_batch: Annotated[
        list[tuple[BatchSize, Seconds]], msgspec.Meta(max_length=DECODE_POINTS_MAX)
    ] = []
    """(batch, seconds of a decode pass of so many rows through one block), batches rising."""
    head: Name = ""
    """Numerics class of the embedding and head that it runs for thin clients; empty: none."""
    coordinate: Coordinate | None = None
    """Where it is in the space of round trips; None: it has not measured any."""
    adapters: Annotated[list[Adapter], msgspec.Meta(max_length=ADAPTERS_MAX)] = []
    """LoRA adapters that it serves to everybody."""
    sent_bytes_per_s: Annotated[float, msgspec.Meta(ge=0.0, le=BYTES_PER_S_MAX)] = 0.0
    """The rate at which others take its bytes, by its real traffic; 0: not known."""

    @property
    def sequence(self) -> tuple[int, int]:
        """(boot, counter): of two records of one peer the higher is the later."""
        return self.boot_ms, self.counter


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    body: Annotated[bytes, msgspec.Meta(max_length=RECORD_BYTES_MAX)]
    signature: Signature


_encoder = msgspec.msgpack.Encoder()
_envelope_decoder = msgspec.msgpack.Decoder(_Envelope)
_record_decoder = msgspec.msgpack.Decoder(Record)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def sign_record(identity: Identity, record: Record) -> bytes:
    """The record as it travels.

    Raises:
        ConfigError: nobody would accept it; the message says why.
    """
    if record.peer != identity.peer:
        raise ConfigError(
            f"{short(identity.peer)} can't sign a record of {short(record.peer)}: "
            "sign it with that peer's own identity"
        )
    body = _encoder.encode(record)
    try:
        _record_decoder.decode(body)
    except _MALFORMED as error:
        raise ConfigError(f"this record is not valid: {error}") from error
    fault = find_fault(record)
    if fault:
        raise ConfigError(f"this record is not valid: {fault}")
    data = _encoder.encode(_Envelope(body, identity.sign(RECORD, body)))
    if len(data) > RECORD_BYTES_MAX:
        raise ConfigError(
            f"a record of {len(data)} bytes is over the limit of {RECORD_BYTES_MAX}: "
            "announce fewer or shorter addresses"
        )
    return data


def open_record(data: bytes) -> Record:
    """The record in an envelope, after every check that needs nothing but the bytes.

    Raises:
        MessageTooLarge: over RECORD_BYTES_MAX.
        ProtocolError: malformed, or not signed by the peer that it names.
        PeerMisbehaved: the peer itself signed what can't be.
    """
    envelope, record = _decode(data)
    if not verify(record.peer, RECORD, envelope.body, envelope.signature):
        raise ProtocolError(f"a record of {short(record.peer)} was not signed by that peer")
    fault = find_fault(record)
    if fault:
        raise PeerMisbehaved(f"{short(record.peer)} signed a record that can't be: {fault}")
    return record


def claimed_peer(data: bytes) -> PeerId:
    """The peer that an envelope names; whether it signed it is not checked.

    Raises:
        ProtocolError: malformed or too large.
    """
    return PeerId(_decode(data)[1].peer)


def claimed_sequence(data: bytes) -> tuple[int, int]:
    """The place in its peer's records that a record claims; a signature is not checked.

    Raises:
        ProtocolError: malformed or too large.
    """
    return _decode(data)[1].sequence


def _decode(data: bytes) -> tuple[_Envelope, Record]:
    if len(data) > RECORD_BYTES_MAX:
        raise MessageTooLarge(f"record of {len(data)} bytes (limit {RECORD_BYTES_MAX})")
    try:
        envelope = _envelope_decoder.decode(data)
        return envelope, _record_decoder.decode(envelope.body)
    except _MALFORMED as error:
        raise ProtocolError(f"malformed record: {error}") from error


def find_fault(record: Record) -> str:
    """What is wrong with a record whose fields are well-formed; empty if nothing is."""
    if not record.start < record.end <= record.num_blocks:
        return f"blocks [{record.start},{record.end}) of a model with {record.num_blocks}"
    intent = record.intent
    if intent is not None and not intent.start < intent.end <= record.num_blocks:
        return f"a move to blocks [{intent.start},{intent.end}) of {record.num_blocks}"
    batches = [batch for batch, _ in record.decode_s_by_batch]
    if any(one >= other for one, other in pairwise(batches)):
        return f"decode times of batches {batches}, which must rise"
    if not 0 < record.ttl_s <= RECORD_TTL_S:
        return f"valid for {record.ttl_s} s (more than 0, at most {RECORD_TTL_S})"
    if not record.addresses and record.state != "offline":
        return "no address"
    for text in record.addresses:
        try:
            address = parse_address(text)
        except ConfigError as error:
            return str(error)
        if address.peer != record.peer:
            return f"address {text!r} is another peer's"
    return ""


def to_server_view(record: Record, data: bytes) -> ServerView:
    """The record as decisions see it; `data` is its envelope, to hand on.

    Raises:
        ValueError: a tombstone, which is no server any more.
    """
    if record.state == "offline":
        raise ValueError(f"{short(record.peer)} has gone: a tombstone is no server")
    return ServerView(
        peer=PeerId(record.peer),
        addresses=tuple(record.addresses),
        span=Span(record.start, record.end),
        state=record.state,
        numerics=record.numerics,
        is_exact=record.is_exact,
        encodings=tuple(record.encodings),
        cache_tokens=record.cache_tokens,
        decode_s_per_block=record.decode_s_per_block,
        prefill_s_per_block_token=record.prefill_s_per_block_token,
        decode_s_by_batch=tuple(record.decode_s_by_batch),
        version=record.version,
        adapters=tuple((adapter.label, adapter.name) for adapter in record.adapters),
        intent=_to_intent(record.intent),
        coordinate=from_wire(record.coordinate),
        sent_bytes_per_s=record.sent_bytes_per_s,
        record=data,
    )


def _to_intent(intent: MoveIntent | None) -> Intent | None:
    if intent is None:
        return None
    span = Span(intent.start, intent.end)
    return Intent(ticket=intent.ticket, span=span, is_going=intent.is_going)
