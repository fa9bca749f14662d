"""Who a peer is: an Ed25519 key, its signatures, and their check.

Every signature covers a context (what kind of statement it is) besides the message,
so that a signature given for one purpose is worth nothing for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from shoal.base.ids import PeerId, short
from shoal.net.keyfile import create_key_file, read_key

ROUTE: Final = "route"
"""Context: the owner of a session names its chain."""

RECORD: Final = "record"
"""Context: a peer's statement about itself in the directory."""

HANDSHAKE: Final = "handshake"
"""Context: a dialler proves its peer id to a listener."""

MEMBERSHIP: Final = "membership"
"""Context: a swarm admits a peer or an inviting key."""

SIGNATURE_BYTES: Final = 64

_PREFIX: Final = b"shoal-signature-1"

_P: Final = 2**255 - 19
_Y8: Final = 0x5FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_WEAK_Y: Final = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})
"""The y coordinates of the curve's eight points whose order divides 8 (_Y8 solves
d*y^4 + 2*y^2 = 1, d being the curve's constant in RFC 8032)."""


def _signed_bytes(context: str, message: bytes) -> bytes:
    name = context.encode("ascii")
    return _PREFIX + bytes([len(name)]) + name + message


@dataclass(frozen=True, slots=True, repr=False)
class Identity:
    """A peer's private key. Never leaves the process except into its own file."""

    key: Ed25519PrivateKey

    @property
    def peer(self) -> PeerId:
        """The public half: the peer's id."""
        return PeerId(self.key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"Identity(peer={short(self.peer)})"

    @classmethod
    def generate(cls) -> Identity:
        """A new identity, held in memory only."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity of a 32-byte secret; equal seeds give equal identities."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """The identity in a key file.

        Raises:
            ConfigError: no such file, no Ed25519 key, or readable by others.
        """
        return cls(read_key(path)[1])

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity in a key file, which is made on first use (mode 0600).

        Raises:
            ConfigError: as `load`, or the file can't be written.
        """
        if not path.exists():
            create_key_file(path, Ed25519PrivateKey.generate())
        return cls.load(path)

    def sign(self, context: str, message: bytes) -> bytes:
        """64 bytes that prove that this peer said `message` as a `context`."""
        return self.key.sign(_signed_bytes(context, message))


def is_weak(peer: bytes) -> bool:
    """Whether a public key is one of the few for which anybody can make signatures.

    Such a key has no secret; one signature in at most eight tries holds for any message.
    """
    y = int.from_bytes(peer, "little") & (2**255 - 1)  # the top bit is the sign of x
    return y % _P in _WEAK_Y


def verify(peer: bytes, context: str, message: bytes, signature: bytes) -> bool:
    """Whether `peer` signed `message` as a `context`. Never raises on a stranger's bytes."""
    if is_weak(peer):
        return False
    try:
        public_key = Ed25519PublicKey.from_public_bytes(peer)
        public_key.verify(signature, _signed_bytes(context, message))
    except (InvalidSignature, ValueError):
        return False
    return True
