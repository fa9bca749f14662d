"""Messages of adapter streams: a client brings a LoRA adapter to a server.

The client offers the manifest, the server says for which blocks it wants tensors, the client
sends their bytes in pieces, in order, and the server answers when they are loaded.
"""

from __future__ import annotations

from shoal.wire.fields import Block, Content, Count, WireMessage


class OfferAdapter(WireMessage, tag=60, frozen=True):
    """Client to server: take this adapter; the frame's payload is its manifest.

    Answered by WantAdapter, or by an Error: it doesn't fit the model, or there is no room.
    """

    call: Count
    name: Content


class WantAdapter(WireMessage, tag=61, frozen=True):
    """Server to client: send the tensors of the blocks [start, end); none if `is_held`."""

    call: Count
    start: Block
    end: Block
    is_held: bool = False


class AdapterPiece(WireMessage, tag=62, frozen=True):
    """Client to server: tensor bytes from `offset` on, in the frame's payload.

    The whole is each wanted block's tensors, blocks rising, as the manifest lists them.
    """

    call: Count
    offset: Count


class TookAdapter(WireMessage, tag=63, frozen=True):
    """Server to client: the adapter is loaded; sessions may name it now."""

    call: Count
