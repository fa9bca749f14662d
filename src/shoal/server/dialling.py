"""Dialling successors: at the addresses of their records, the first that answers."""

from __future__ import annotations

from functools import partial

from shoal.base.errors import PeerUnknown
from shoal.base.ids import PeerId, short
from shoal.net.channel import PURPOSE_ROWS_OUT, Channel, open_channel
from shoal.net.first import first_of
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport
from shoal.server.config import AddressBook


async def dial_rows(
    transport: Transport, book: AddressBook, swarm_pass: SwarmPass, peer: PeerId
) -> Channel:
    """A stream on which we send rows to a peer.

    Raises:
        PeerUnknown: there is no record.
        ShoalError: why it can't be had at one of its addresses.
    """
    addresses = book.addresses(peer)
    if not addresses:
        raise PeerUnknown(f"no valid record of peer {short(peer)}")
    return await first_of(
        [partial(open_channel, transport, one, PURPOSE_ROWS_OUT, swarm_pass) for one in addresses],
        Channel.close,
    )
