"""Records: what a peer signs comes back as it was; what can't be is refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError, MessageTooLarge, PeerMisbehaved, ProtocolError
from shoal.base.ids import peer_text
from shoal.base.limits import RECORD_BYTES_MAX
from shoal.base.spans import Span
from shoal.discovery.coordinates import from_wire
from shoal.discovery.records import (
    MoveIntent,
    claimed_peer,
    open_record,
    sign_record,
    to_server_view,
)
from shoal.net.identity import RECORD, ROUTE, Identity
from shoal.plan import coordinates as plan
from shoal.plan.view import Intent
from shoal.wire.fields import Coordinate
from tests.unit.discovery_cases import identity, record, signed

ALICE, BOB = identity(1), identity(2)
BOBS_ADDRESS = f"tcp://{peer_text(BOB.peer)}@127.0.0.1:1"


def envelope(body: bytes, signer: Identity = ALICE, context: str = RECORD) -> bytes:
    return msgspec.msgpack.encode([body, signer.sign(context, body)])


def body_of(**fields: Any) -> bytes:
    return msgspec.msgpack.encode(record(ALICE, **fields))


@given(
    counter=st.integers(0, 2**53),
    ttl_s=st.floats(0.001, 600),
    state=st.sampled_from(["joining", "online", "draining", "offline"]),
    start=st.integers(0, 5),
    end=st.integers(6, 12),
    is_exact=st.booleans(),
    encodings=st.lists(st.text(max_size=20), max_size=32),
    decode_s_per_block=st.floats(0, 1e9),
    session_tokens_max=st.integers(1, 1 << 20),
)
def test_round_trip(**fields: Any) -> None:
    data = signed(ALICE, **fields)
    assert open_record(data) == record(ALICE, **fields)
    assert claimed_peer(data) == ALICE.peer


def test_fields_of_later_versions_are_ignored_and_missing_ones_have_defaults() -> None:
    fields = msgspec.msgpack.decode(body_of())
    later = msgspec.msgpack.encode([*fields, "new", {"more": 1}])
    assert open_record(envelope(later)) == record(ALICE)
    old = open_record(envelope(msgspec.msgpack.encode(fields[:12])))
    assert (old.numerics, old.is_exact, old.encodings) == ("", False, [])


IMPOSSIBLE: dict[str, dict[str, Any]] = {
    "empty span": {"start": 4, "end": 4},
    "a move to nowhere": {"intent": MoveIntent(ticket=1, start=4, end=4)},
    "a move beyond the model": {"intent": MoveIntent(ticket=1, start=4, end=13)},
    "backward span": {"start": 5, "end": 4},
    "batches that don't rise": {"decode_s_by_batch": [(1, 0.1), (1, 0.2)]},
    "a batch of nothing": {"decode_s_by_batch": [(0, 0.1)]},
    "too many batches": {"decode_s_by_batch": [(one + 1, 0.1) for one in range(9)]},
    "beyond the model": {"end": 13},
    "never valid": {"ttl_s": 0.0},
    "valid too long": {"ttl_s": 601.0},
    "decode time": {"decode_s_per_block": float("nan")},
    "prefill time": {"prefill_s_per_block_token": float("nan")},
    "no address": {"addresses": []},
    "no address of ours": {"addresses": ["tcp://127.0.0.1:1"]},
    "another peer's address": {"addresses": [BOBS_ADDRESS]},
    "nonsense for an address": {"addresses": ["nonsense"]},
}


@pytest.mark.parametrize("fields", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_what_can_not_be_is_neither_signed_nor_believed(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not valid"):
        signed(ALICE, **fields)
    with pytest.raises((PeerMisbehaved, ProtocolError)):
        open_record(envelope(body_of(**fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"peer": b"short"},
        {"state": "asleep"},
        {"num_blocks": 0},
        {"hidden_size": 0},
        {"hidden_size": 1 << 21},
        {"start": -1},
        {"ttl_s": -1.0},
        {"ttl_s": float("inf")},
        {"decode_s_per_block": -0.5},
        {"counter": -1},
        {"model": "m" * 257},
        {"addresses": ["tcp://x"] * 17},
        {"addresses": ["x" * 513]},
        {"encodings": ["e"] * 33},
        {"session_tokens_max": 0},
    ],
    ids=str,
)
def test_malformed_fields_are_a_protocol_error(fields: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        open_record(envelope(body_of(**fields)))


def test_a_malformed_record_is_not_signed() -> None:
    with pytest.raises(ConfigError, match="not valid"):
        signed(ALICE, state="asleep")


def test_a_record_over_the_limit_is_not_signed_and_not_read() -> None:
    host = "h" * 440
    long = [f"tcp://{peer_text(ALICE.peer)}@{host}:1"] * 16
    with pytest.raises(ConfigError, match="limit"):
        signed(ALICE, addresses=long, encodings=["e" * 256] * 32)
    with pytest.raises(MessageTooLarge):
        open_record(b"\x00" * (RECORD_BYTES_MAX + 1))


def test_nobody_signs_for_another() -> None:
    with pytest.raises(ConfigError, match="own identity"):
        sign_record(BOB, record(ALICE))
    for forged in (envelope(body_of(), BOB), envelope(body_of(), ALICE, ROUTE)):
        with pytest.raises(ProtocolError, match="not signed"):
            open_record(forged)


@given(st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject) -> None:
    good = signed(ALICE)
    bad = bytearray(good)
    bad[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError):
        open_record(bytes(bad))


@given(st.binary(max_size=300))
def test_garbage_is_a_protocol_error(garbage: bytes) -> None:
    for data in (garbage, envelope(garbage)):
        with pytest.raises(ProtocolError):
            open_record(data)
        with pytest.raises(ProtocolError):
            claimed_peer(data)


def test_a_record_as_decisions_see_it() -> None:
    fields: dict[str, Any] = {
        "state": "draining",
        "start": 2,
        "end": 5,
        "is_exact": True,
        "cache_tokens": 7,
        "decode_s_per_block": 0.5,
        "prefill_s_per_block_token": 0.25,
        "version": "1",
    }
    data = signed(ALICE, **fields)
    view = to_server_view(open_record(data), data)
    assert (view.peer, view.span, view.state, view.record) == (
        ALICE.peer,
        Span(2, 5),
        "draining",
        data,
    )
    assert (view.numerics, view.is_exact, view.encodings) == ("a", True, ("float32",))
    assert (view.cache_tokens, view.version) == (7, "1")
    assert (view.decode_s_per_block, view.prefill_s_per_block_token) == (0.5, 0.25)
    assert view.addresses == tuple(record(ALICE).addresses)


def test_a_tombstone_is_no_server() -> None:
    data = signed(ALICE, state="offline", addresses=[])
    with pytest.raises(ValueError, match="tombstone"):
        to_server_view(open_record(data), data)


def test_an_intent_to_move_travels_and_old_readers_do_without() -> None:
    intent = MoveIntent(ticket=7, start=2, end=6, is_going=True)
    data = signed(ALICE, intent=intent)
    assert open_record(data).intent == intent
    view = to_server_view(open_record(data), data)
    assert view.intent == Intent(ticket=7, span=Span(2, 6), is_going=True)
    assert to_server_view(record(ALICE), b"").intent is None
    fields = msgspec.msgpack.decode(body_of(intent=intent, decode_s_by_batch=[(1, 0.5)]))
    del fields[record(ALICE).__struct_fields__.index("decode_s_by_batch") + 1 :]
    assert fields.pop() == [[1, 0.5]]
    assert fields.pop() == [7, 2, 6, True]
    assert open_record(envelope(msgspec.msgpack.encode(fields))) == record(ALICE)


def test_a_coordinate_travels_and_nonsense_does_not() -> None:
    place = Coordinate([0.01, -0.02, 0.03], 0.004, 0.1)
    data = signed(ALICE, coordinate=place)
    view = to_server_view(open_record(data), data)
    assert view.coordinate == plan.Coordinate(point=(0.01, -0.02, 0.03), height=0.004, error=0.1)
    for bad in (
        Coordinate([0.0, 0.0], 0.0, 0.0),
        Coordinate([0.0, 0.0, 11.0], 0.0, 0.0),
        Coordinate([0.0, 0.0, 0.0], -1.0, 0.0),
        Coordinate([0.0, 0.0, 0.0], 0.0, math.inf),
    ):
        with pytest.raises(ConfigError):
            signed(ALICE, coordinate=bad)
    nan = Coordinate([math.nan, 0.0, 0.0], 0.0, 0.0)
    assert not plan.is_sound(from_wire(nan) or plan.NOWHERE)
