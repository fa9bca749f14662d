"""What two directories compare: one hash for each bucket of records, kept up as they change."""

from __future__ import annotations

import struct
from hashlib import blake2b

from shoal.base.ids import PeerId
from shoal.base.limits import DIGEST_BUCKETS

_SEQUENCE = struct.Struct("<QQ")
_HASHES = struct.Struct(f"<{DIGEST_BUCKETS}Q")


class RunningDigest:
    """Bucket hashes of a changing set of (peer, sequence). See `wire.messages.Digest`."""

    def __init__(self) -> None:
        self._hashes = [0] * DIGEST_BUCKETS

    def toggle(self, peer: PeerId, sequence: tuple[int, int]) -> None:
        """Put a record in; or take it out, if it is in."""
        content = peer + _SEQUENCE.pack(*sequence)
        value = int.from_bytes(blake2b(content, digest_size=8).digest(), "little")
        self._hashes[bucket_of(peer)] ^= value

    def pack(self) -> bytes:
        """The hashes as they travel."""
        return _HASHES.pack(*self._hashes)

    def differing(self, hashes: bytes) -> bytes:
        """The buckets, one byte each, in which another's packed hashes are not ours."""
        theirs = _HASHES.unpack(hashes)
        return bytes(index for index, own in enumerate(self._hashes) if own != theirs[index])


def bucket_of(peer: PeerId) -> int:
    """The bucket that a peer's record is in."""
    return peer[-1] % DIGEST_BUCKETS
