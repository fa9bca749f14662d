"""Dialling servers: at the addresses of their records, the first that answers."""

from __future__ import annotations

from functools import partial

from shoal.base.errors import PeerUnknown
from shoal.base.ids import PeerId, short
from shoal.discovery.directory import SignedRecord
from shoal.net.address import parse_address
from shoal.net.channel import Channel, open_channel
from shoal.net.first import first_of
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport


async def dial_server(
    transport: Transport,
    swarm_pass: SwarmPass,
    peer: PeerId,
    found: SignedRecord | None,
    purpose: str,
) -> Channel:
    """A stream for `purpose` to the server that has this record.

    Raises:
        PeerUnknown: there is no record.
        ShoalError: why it can't be reached at one of its addresses.
    """
    if found is None or not found.record.addresses:
        raise PeerUnknown(f"no record of peer {short(peer)}")

    async def dial(text: str) -> Channel:
        return await open_channel(transport, parse_address(text), purpose, swarm_pass)

    return await first_of([partial(dial, text) for text in found.record.addresses], Channel.close)
