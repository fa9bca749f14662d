"""Identities: signatures, and the files that keep them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError
from shoal.base.ids import PEER_ID_BYTES, short
from shoal.net.identity import (
    _WEAK_Y,
    HANDSHAKE,
    MEMBERSHIP,
    RECORD,
    ROUTE,
    SIGNATURE_BYTES,
    Identity,
    is_weak,
    verify,
)
from shoal.net.keyfile import KEY_FILE_BYTES_MAX, create_key_file, read_key

ALICE = Identity.generate()
BOB = Identity.generate()


@given(message=st.binary(max_size=1_000), context=st.sampled_from([ROUTE, RECORD, HANDSHAKE]))
def test_a_signature_holds_for_its_peer_context_and_message_only(
    message: bytes, context: str
) -> None:
    signature = ALICE.sign(context, message)
    assert len(signature) == SIGNATURE_BYTES
    assert verify(ALICE.peer, context, message, signature)
    assert not verify(BOB.peer, context, message, signature)
    assert not verify(ALICE.peer, MEMBERSHIP, message, signature)
    assert not verify(ALICE.peer, context, message + b"x", signature)


def test_context_and_message_do_not_run_into_each_other() -> None:
    assert not verify(ALICE.peer, "route", b"xyz", ALICE.sign("routex", b"yz"))


@given(peer=st.binary(max_size=40), signature=st.binary(max_size=70))
def test_verify_takes_any_bytes(peer: bytes, signature: bytes) -> None:
    assert not verify(peer, ROUTE, b"message", signature)


PRIME = 2**255 - 19
CURVE_D = -121_665 * pow(121_666, -1, PRIME) % PRIME


def doubled(y: int) -> int:
    """The y coordinate of twice a point of edwards25519 (RFC 8032, section 5.1)."""
    y2 = y * y % PRIME
    x2 = (y2 - 1) * pow(CURVE_D * y2 + 1, -1, PRIME) % PRIME
    return (y2 + x2) * pow(2 + x2 - y2, -1, PRIME) % PRIME


def encodings(y: int) -> list[bytes]:
    """All 32-byte strings for this y, canonical or not, with either sign of x."""
    values = [value for value in (y, y + PRIME) if value < 2**255]
    return [(value | sign << 255).to_bytes(32, "little") for value in values for sign in (0, 1)]


def test_the_weak_keys_are_the_points_of_small_order() -> None:
    assert len(_WEAK_Y) == 5  # orders 1, 2, 4 (two points of one y), 8 (four of two)
    for y in _WEAK_Y:
        assert doubled(doubled(doubled(y))) == 1


@pytest.mark.parametrize("y", sorted(_WEAK_Y))
def test_nobody_is_a_weak_key(y: int) -> None:
    """For them a signature of zeros, or of the key itself, would hold for many messages."""
    for peer in encodings(y):
        for start in (peer, bytes(32), (1).to_bytes(32, "little")):
            for index in range(16):
                assert not verify(peer, ROUTE, bytes([index]), start + bytes(32))


def test_honest_keys_are_not_weak() -> None:
    assert not any(is_weak(Identity.from_seed(bytes([i]) * 32).peer) for i in range(50))


def test_a_peer_id_is_the_public_key() -> None:
    assert len(ALICE.peer) == PEER_ID_BYTES
    assert Identity.from_seed(bytes(32)).peer == Identity.from_seed(bytes(32)).peer


def test_an_identity_shows_no_secret() -> None:
    assert repr(ALICE) == f"Identity(peer={short(ALICE.peer)})"


def test_an_identity_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "identity.pem"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Identity.load_or_create(path).peer == made.peer
    assert Identity.load(path).peer == made.peer
    assert [file.name for file in path.parent.iterdir()] == ["identity.pem"]


def test_the_first_of_two_processes_makes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    assert create_key_file(path, ALICE.key)
    assert not create_key_file(path, BOB.key)
    assert Identity.load(path).peer == ALICE.peer


def test_text_before_the_key_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    create_key_file(path, ALICE.key, "swarm: größe")
    assert read_key(path)[0] == "swarm: größe"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key file"):
        Identity.load(tmp_path / "absent.pem")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.load(path)


def other_key() -> bytes:
    key = generate_private_key(SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no private key"),
        (b"hello", "no private key"),
        (b"-----BEGIN PRIVATE KEY-----\nnonsense\n-----END PRIVATE KEY-----\n", "no private key"),
        (b"\xff\xfe" + other_key(), "no private key"),
        (bytes(KEY_FILE_BYTES_MAX + 10), "no private key"),
        (other_key(), "another kind"),
    ],
)
def test_a_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=problem):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_directory_is_no_key_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read"):
        Identity.load(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't write"):
        create_key_file(tmp_path / "file" / "identity.pem", ALICE.key)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="can't write"):
        Identity.load_or_create(tmp_path / "identity.pem")
