"""Addresses as text."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import PEER_ID_BYTES, PeerId, peer_text
from shoal.net.address import Address, ListenAddress, parse_address, parse_listen

PEER = PeerId(bytes(range(PEER_ID_BYTES)))
TEXT = peer_text(PEER)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"tcp://{TEXT}@127.0.0.1:7000", Address("tcp", PEER, "127.0.0.1", 7000)),
        (f"tcp://{TEXT.upper()}@host.example:1", Address("tcp", PEER, "host.example", 1)),
        (f"tcp://{TEXT}@[::1]:65535", Address("tcp", PEER, "::1", 65_535)),
        (f"  tcp://{TEXT}@[fe80::1%eth0]:7\n", None),
        (f"memory://{TEXT}@alice:1", Address("memory", PEER, "alice", 1)),
    ],
)
def test_an_address_is_read(text: str, expected: Address | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError):
            parse_address(text)
    else:
        assert parse_address(text) == expected


@given(
    peer=st.binary(min_size=32, max_size=32),
    host=st.sampled_from(["127.0.0.1", "a-b.example", "::1", "2001:db8::7"]),
    port=st.integers(0, 65_535),
)
def test_an_address_survives_its_text(peer: bytes, host: str, port: int) -> None:
    address = Address("tcp", PeerId(peer), host, port)
    assert parse_address(str(address)) == address
    where = ListenAddress("tcp", host, port)
    assert parse_listen(str(where)) == where


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        f"{TEXT}@127.0.0.1:7000",
        f"tcp://{TEXT}@127.0.0.1",
        f"tcp://{TEXT}@:7000",
        f"tcp://{TEXT}@::1:7000",
        f"tcp://{TEXT}@127.0.0.1:70000",
        f"tcp://{TEXT}@127.0.0.1:7000/path",
        f"tcp://{TEXT[:-1]}@127.0.0.1:7000",
        f"tcp://{TEXT[:-1]}!@127.0.0.1:7000",
        f"tcp://{TEXT}aaaaaaaa@127.0.0.1:7000",
        f"TCP://{TEXT}@127.0.0.1:7000",
        "tcp://127.0.0.1:7000",
        f"tcp://@127.0.0.1:7000{TEXT}",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


@given(st.text(max_size=100))
def test_any_text_is_an_address_or_a_configuration_error(text: str) -> None:
    for parse in (parse_address, parse_listen):
        with suppress(ConfigError):
            parse(text)


def test_an_address_to_listen_on_has_no_peer_id() -> None:
    assert parse_listen("tcp://0.0.0.0:0") == ListenAddress("tcp", "0.0.0.0", 0)
    with pytest.raises(ConfigError, match="no peer id"):
        parse_listen(f"tcp://{TEXT}@0.0.0.0:0")
    with pytest.raises(ConfigError, match="no peer id in"):
        parse_address("tcp://0.0.0.0:1")
