"""Ids: texts that read back, and sessions that commit to their owner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import (
    NONCE_BYTES,
    PEER_ID_BYTES,
    SESSION_ID_BYTES,
    PeerId,
    parse_peer,
    peer_text,
    session_id,
    short,
)

peers = st.binary(min_size=PEER_ID_BYTES, max_size=PEER_ID_BYTES).map(PeerId)
nonces = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)


@given(peers)
def test_a_peer_reads_back_as_it_is_written(peer: PeerId) -> None:
    text = peer_text(peer)
    assert len(text) == 52
    assert text == text.lower()
    assert parse_peer(text) == parse_peer(f" {text.upper()}\n") == peer
    assert text.startswith(short(peer))
    assert len(short(peer)) == 8


@given(st.text(max_size=60))
def test_other_texts_are_refused(text: str) -> None:
    try:
        peer = parse_peer(text)
    except ConfigError as error:
        assert "52 base32 letters" in error.detail  # noqa: PT017 - most texts, not all, raise
    else:
        assert len(peer) == PEER_ID_BYTES


@pytest.mark.parametrize("text", ["", "a", "a" * 51, "a" * 53, "a" * 104, "1" * 52, "ä" * 52])
def test_near_misses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a peer id"):
        parse_peer(text)


@given(peers, peers, nonces, nonces)
def test_a_session_commits_to_owner_and_nonce(
    one: PeerId, two: PeerId, first: bytes, second: bytes
) -> None:
    session = session_id(one, first)
    assert len(session) == SESSION_ID_BYTES
    assert session == session_id(one, first)
    assert (session == session_id(two, second)) == ((one, first) == (two, second))
