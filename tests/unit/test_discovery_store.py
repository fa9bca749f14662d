"""The record store: latest wins, nothing is renewed by repetition, all is bounded."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import PeerBusy, PeerMisbehaved, PeerRefused, ProtocolError
from shoal.base.limits import RECORD_TTL_S
from shoal.discovery import store as store_source
from shoal.discovery.directory import SignedRecord, Snapshot
from shoal.discovery.store import RecordStore
from tests.unit.discovery_cases import SWARM, identity, record, signed

PEERS = [identity(number) for number in range(1, 6)]
ALICE, BOB = PEERS[:2]


def here(store: RecordStore) -> dict[bytes, tuple[int, int]]:
    return {bytes(r.record.peer): r.record.sequence for r in store.snapshot().records}


def test_the_latest_wins_in_any_order() -> None:
    store = RecordStore(SWARM)
    assert store.accept(signed(ALICE, 1), 0.0)
    assert not store.accept(signed(ALICE, 1), 1.0)
    assert not store.accept(signed(ALICE, 1, model="other"), 1.0)
    assert not store.accept(signed(ALICE, 0), 1.0)
    assert not store.accept(signed(ALICE, 9, boot_ms=999), 1.0)
    assert store.accept(signed(ALICE, 0, boot_ms=1_001), 1.0)
    assert here(store) == {ALICE.peer: (1_001, 0)}


def test_repetition_never_renews() -> None:
    store = RecordStore(SWARM)
    data = signed(ALICE, ttl_s=10.0)
    store.accept(data, 0.0)
    assert not store.accept(data, 9.0)
    assert store.next_expiry_s == 10.0
    store.expire(9.9)
    assert here(store)
    store.expire(10.0)
    assert not here(store)
    assert not store.accept(data, 10.0), "an old copy does not come back to life"
    assert store.accept(signed(ALICE, 1), 11.0)
    assert store.sequence(ALICE.peer) == (1_000, 1)


def test_validity_counts_from_receipt() -> None:
    store = RecordStore(SWARM)
    store.accept(signed(ALICE), 5_000.0)
    assert store.next_expiry_s == 5_000.0 + RECORD_TTL_S
    assert RecordStore(SWARM).next_expiry_s == math.inf


def test_a_lasting_store_never_expires() -> None:
    store = RecordStore(SWARM, is_lasting=True)
    store.accept(signed(ALICE, ttl_s=1.0), 0.0)
    store.expire(1e9)
    assert here(store)
    assert store.next_expiry_s == math.inf


def test_a_tombstone_removes_and_is_handed_on_until_it_expires() -> None:
    store = RecordStore(SWARM)
    store.accept(signed(ALICE, 0), 0.0)
    gone = signed(ALICE, 1, state="offline", addresses=[])
    assert store.accept(gone, 1.0)
    assert not here(store)
    assert list(store.envelopes()) == [(ALICE.peer, gone)]
    found = store.find(ALICE.peer)
    assert found is not None
    assert found.record.state == "offline"
    assert not store.accept(signed(ALICE, 0), 2.0)
    version = store.version
    store.expire(1.0 + RECORD_TTL_S)
    assert store.version == version, "the snapshot did not change"
    assert not list(store.envelopes())
    assert not store.accept(signed(ALICE, 0), 700.0)


def test_a_tombstone_of_an_unknown_peer_changes_nothing_visible() -> None:
    store = RecordStore(SWARM)
    assert store.accept(signed(ALICE, 1, state="offline"), 0.0)
    assert store.version == 0
    assert store.accept(signed(ALICE, 2), 0.0), "it came back"
    assert here(store)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"garbage", ProtocolError),
        (signed(ALICE)[:-1], ProtocolError),
        (signed(ALICE, swarm="other"), PeerRefused),
    ],
    ids=["garbage", "cut off", "another swarm"],
)
def test_bad_records_are_refused(data: bytes, error: type[Exception]) -> None:
    store = RecordStore(SWARM)
    with pytest.raises(error):
        store.accept(data, 0.0)
    assert store.version == 0
    assert store.find(ALICE.peer) is None


def test_a_full_store_forgets_the_dead_and_refuses_the_rest() -> None:
    store = RecordStore(SWARM, records_max=2)
    store.accept(signed(PEERS[0]), 0.0)
    store.accept(signed(PEERS[1], 1, state="offline"), 0.0)
    assert store.accept(signed(PEERS[2]), 1.0)
    assert set(here(store)) == {PEERS[0].peer, PEERS[2].peer}
    with pytest.raises(PeerBusy) as caught:
        store.accept(signed(PEERS[3]), 2.0)
    assert caught.value.retry_after_s == RECORD_TTL_S
    assert store.accept(signed(PEERS[0], 1), 2.0), "those inside may change"
    assert store.accept(signed(PEERS[3]), RECORD_TTL_S + 1.0), "the third has expired"


def test_remembered_sequences_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_source, "REMEMBERED_MAX", 2)
    store = RecordStore(SWARM)
    for index, who in enumerate(PEERS):
        store.accept(signed(who, ttl_s=1.0), float(index))
    store.expire(100.0)
    assert [store.sequence(who.peer) is not None for who in PEERS] == [False] * 3 + [True] * 2


def test_listeners_hear_of_changes_only() -> None:
    store = RecordStore(SWARM)
    heard: list[int] = []
    store.on_change(lambda: heard.append(store.version))
    store.accept(signed(ALICE), 0.0)
    store.accept(signed(ALICE), 1.0)
    store.accept(signed(BOB), 1.0)
    store.expire(1e6)
    assert heard == [1, 2, 3]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(0, 4),
            st.sampled_from(["online", "offline"]),
            st.sampled_from([0.0, 1.0, 5.0]),
        ),
        max_size=25,
    )
)
def test_the_store_is_what_a_plain_model_says(steps: list[tuple[int, int, str, float]]) -> None:
    store = RecordStore(SWARM)
    highest: dict[int, int] = {}
    valid: dict[int, tuple[int, str, float]] = {}
    now_s = 0.0
    for who, counter, state, wait_s in steps:
        now_s += wait_s
        version, before = store.version, here(store)
        is_news = store.accept(signed(PEERS[who], counter, state=state, ttl_s=6.0), now_s)
        assert is_news == (counter > highest.get(who, -1))
        if is_news:
            highest[who] = counter
            valid[who] = (counter, state, now_s + 6.0)
        expected = {
            PEERS[index].peer: (1_000, held)
            for index, (held, kind, expires_s) in valid.items()
            if kind == "online" and expires_s > now_s
        }
        assert here(store) == expected
        assert (store.version != version) or before == expected
        assert store.snapshot() is store.snapshot()


# --- snapshots -----------------------------------------------------------------


def snapshot(*fields: dict[str, Any]) -> Snapshot:
    records = tuple(
        SignedRecord(record=record(who, **one), data=b"")
        for who, one in zip(PEERS, fields, strict=False)
    )
    return Snapshot(version=1, records=records)


def test_a_view_holds_one_models_servers() -> None:
    view = snapshot({}, {"model": "other"}, {"state": "joining"}).view("model")
    assert [one.peer for one in view.servers] == [PEERS[0].peer, PEERS[2].peer]
    assert (view.model, view.num_blocks, view.hidden_size) == ("model", 12, 64)


def test_servers_that_disagree_about_the_models_shape_are_left_out() -> None:
    liar = {"num_blocks": 40, "end": 40}
    shot = snapshot({}, liar, {})
    assert [one.peer for one in shot.view("model").servers] == [PEERS[0].peer, PEERS[2].peer]
    assert [one.peer for one in shot.view("model", (40, 64)).servers] == [PEERS[1].peer]
    assert shot.view("model", (12, 65)).servers == ()


def test_a_model_that_nobody_serves() -> None:
    view = snapshot({}).view("none")
    assert (view.num_blocks, view.servers) == (0, ())


def test_models_and_peers_of_a_snapshot() -> None:
    shot = snapshot({"model": "a"}, {"model": "b"}, {"model": "b"})
    assert shot.models() == ("b", "a")
    assert shot.find(PEERS[1].peer) is shot.records[1]
    assert shot.find(PEERS[4].peer) is None


def test_a_peer_that_signs_nonsense_is_named() -> None:
    import msgspec

    from shoal.net.identity import RECORD

    body = msgspec.msgpack.encode(record(ALICE, end=99))
    with pytest.raises(PeerMisbehaved, match="can't be"):
        RecordStore(SWARM).accept(msgspec.msgpack.encode([body, ALICE.sign(RECORD, body)]), 0.0)
