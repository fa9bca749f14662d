"""A stream from a peer to itself, inside its process: nothing to prove, nothing to encrypt.

For two hops of one session on one server, where the second is fed from the first one's log.
"""

from __future__ import annotations

from shoal.base.ids import PeerId
from shoal.net.conditions import PerfectConditions
from shoal.net.memory import BUFFER_BYTES
from shoal.net.memory_stream import MemoryStream, Switchboard, connect


def loopback(peer: PeerId) -> tuple[MemoryStream, MemoryStream]:
    """The two ends of a new stream. Each ends when the other is closed."""
    open_streams: dict[MemoryStream, None] = {}
    near, far = MemoryStream(peer, peer, open_streams), MemoryStream(peer, peer, open_streams)
    connect(Switchboard(PerfectConditions(), BUFFER_BYTES), near, far)
    return near, far
