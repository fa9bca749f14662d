"""Identities and records for the tests of discovery."""

from __future__ import annotations

from typing import Any

from shoal.base.ids import peer_text
from shoal.discovery.records import Record, sign_record
from shoal.net.identity import Identity

SWARM = "tests"


def identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32, "big"))


def record(who: Identity, counter: int = 0, **fields: Any) -> Record:
    usual: dict[str, Any] = {
        "peer": who.peer,
        "swarm": SWARM,
        "boot_ms": 1_000,
        "counter": counter,
        "ttl_s": 600.0,
        "state": "online",
        "addresses": [f"memory://{peer_text(who.peer)}@host:1"],
        "model": "model",
        "num_blocks": 12,
        "hidden_size": 64,
        "start": 0,
        "end": 12,
        "numerics": "a",
        "encodings": ["float32"],
    }
    return Record(**usual | fields)


def signed(who: Identity, counter: int = 0, **fields: Any) -> bytes:
    return sign_record(who, record(who, counter, **fields))
