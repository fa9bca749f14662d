"""Dialling successors: at the addresses of their records, one after the other."""

from __future__ import annotations

from shoal.base.errors import PeerUnknown, ShoalError
from shoal.base.ids import PeerId, short
from shoal.net.channel import PURPOSE_ROWS_OUT, Channel, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport
from shoal.server.config import AddressBook


async def dial_rows(
    transport: Transport, book: AddressBook, swarm_pass: SwarmPass, peer: PeerId
) -> Channel:
    """A stream on which we send rows to a peer.

    Raises:
        ShoalError: why it can't be had at the last of its addresses.
    """
    error: ShoalError = PeerUnknown(f"no valid record of peer {short(peer)}")
    for address in book.addresses(peer):
        try:
            return await open_channel(transport, address, PURPOSE_ROWS_OUT, swarm_pass)
        except ShoalError as failure:
            error = failure
    raise error
