"""Identifiers: who (peers) and what (sessions).

A peer id is the peer's Ed25519 public key; it is shown as 52 base32 letters.
A session id commits to the peer that owns the session, so that nobody else can
speak for it: `new_session_id` hashes the owner's id with a nonce.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import NewType

from shoal.base.errors import ConfigError

PeerId = NewType("PeerId", bytes)
"""32 bytes: an Ed25519 public key."""

SessionId = NewType("SessionId", bytes)
"""16 bytes: BLAKE2b-128 over (owner, nonce)."""

PEER_ID_BYTES = 32
SESSION_ID_BYTES = 16
NONCE_BYTES = 16


def peer_text(peer: bytes) -> str:
    """The peer id as 52 lower-case base32 letters."""
    return base64.b32encode(peer).decode("ascii").rstrip("=").lower()


def short(identifier: bytes) -> str:
    """The first 8 letters of an id, for logs and tables."""
    return peer_text(identifier)[:8]


def parse_peer(text: str) -> PeerId:
    """The inverse of `peer_text`.

    Raises:
        ConfigError: the text is not 52 base32 letters.
    """
    padded = text.strip().upper()
    padded += "=" * (-len(padded) % 8)
    try:
        raw = base64.b32decode(padded)
    except (binascii.Error, ValueError) as error:
        raise ConfigError(f"not a peer id: {text!r} (expected 52 base32 letters)") from error
    if len(raw) != PEER_ID_BYTES:
        raise ConfigError(
            f"not a peer id: {text!r} has {len(raw)} bytes, expected {PEER_ID_BYTES} "
            "(52 base32 letters)"
        )
    return PeerId(raw)


def session_id(owner: PeerId, nonce: bytes) -> SessionId:
    """The id of the session that `owner` opens with `nonce` (16 random bytes)."""
    digest = hashlib.blake2b(owner + nonce, digest_size=SESSION_ID_BYTES, person=b"shoal-session")
    return SessionId(digest.digest())
