"""Dialling servers: at the addresses of their records, one after the other."""

from __future__ import annotations

from shoal.base.errors import ConfigError, PeerUnknown, ShoalError
from shoal.base.ids import PeerId, short
from shoal.discovery.directory import SignedRecord
from shoal.net.address import parse_address
from shoal.net.channel import Channel, open_channel
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
        ShoalError: there is no record, or why it can't be reached at its last address.
    """
    error: ShoalError = PeerUnknown(f"no record of peer {short(peer)}")
    for text in found.record.addresses if found is not None else ():
        try:
            return await open_channel(transport, parse_address(text), purpose, swarm_pass)
        except (ShoalError, ConfigError) as failure:
            error = failure
    raise error
