"""Rows on the wire that can't be: each gets a typed answer, and nobody else notices."""

import msgspec
import pytest

from shoal.base.errors import PeerUnreachable
from shoal.base.ids import PeerId, session_id
from shoal.lab.toy_backend import MODEL
from shoal.lab.toy_blocks import toy_embedding
from shoal.net.address import parse_address
from shoal.net.channel import PURPOSE_CONTROL, PURPOSE_ROWS_OUT, open_channel
from shoal.net.identity import ROUTE, Identity
from shoal.wire.messages import (
    WANT_LAST,
    Entry,
    Error,
    Failed,
    Have,
    Hop,
    Open,
    Route,
    RouteBody,
    Routed,
    Rows,
    encode,
)
from tests.simulation.scene import scene

ROW = toy_embedding(1)

BAD_ROWS = {
    "too short a row": ({"payload_bytes": len(ROW) - 4}, ROW[:-4], "bad_input"),
    "too many rows": ({"payload_bytes": 2 * len(ROW)}, 2 * ROW, "bad_input"),
    "an encoding nobody knows": ({"encoding": "float8"}, ROW, "bad_input"),
    "another dtype's size": ({"encoding": "bfloat16"}, ROW, "bad_input"),
    "not a number": ({}, b"\xff" * len(ROW), "bad_input"),
    "beyond the context": (
        {"position": 0, "count": 4096, "call_count": 4096, "payload_bytes": 4096 * len(ROW)},
        4096 * ROW,
        "too_long",
    ),
}


class Stranger:
    """Speaks the protocol by hand, to server `a`, as the owner of one session."""

    def __init__(self, it, seed):
        self.identity = Identity.from_seed(bytes([seed]) * 32)
        self.session = session_id(self.identity.peer, b"n" * 16)
        self._it = it
        self._transport = it.swarm.memory.transport(self.identity.peer)

    async def channel(self, purpose):
        found = self._it.swarm.directory.snapshot().find(PeerId(self._it["a"].peer))
        address = parse_address(found.record.addresses[0])
        return await open_channel(self._transport, address, purpose, self._it.swarm.swarm_pass)

    async def open(self):
        """A session over the one server, and the link into it."""
        self.control = await self.channel(PURPOSE_CONTROL)
        hops = [Hop(self._it["a"].peer, 0, 2, "float32")]
        body = encode(RouteBody(self.identity.peer, b"n" * 16, 1, MODEL, 1, hops))
        await self.control.send(Route(1, body, self.identity.sign(ROUTE, body)))
        assert isinstance((await self.control.receive())[0], Routed)
        self.rows = await self.channel(PURPOSE_ROWS_OUT)
        await self.rows.send(Open(self.session, 0, 1))
        assert isinstance((await self.rows.receive())[0], Have)

    async def send(self, payload, **changes):
        entry = Entry(
            session=self.session, border=0, epoch=1, rev=0, base_rev=0, cuts=[], position=0,
            count=1, call_count=1, want=WANT_LAST, encoding="float32", payload_bytes=len(ROW),
        )  # fmt: skip
        await self.rows.send(Rows([msgspec.structs.replace(entry, **changes)]), payload)

    async def close(self):
        await self._transport.close()


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_end_their_session_with_the_reason_and_no_other(name):
    changes, payload, code = BAD_ROWS[name]

    @scene("a 0:2", cache_tokens=1024)
    async def story(it):
        reader = await it.read(8)
        stranger = Stranger(it, 7)
        await stranger.open()
        await stranger.send(payload, **changes)
        message = (await stranger.control.receive())[0]
        assert isinstance(message, Failed)
        assert message.code == code
        assert message.detail
        await reader.decode(5)
        await stranger.close()

    story()


def test_entries_that_do_not_add_up_end_only_their_stream():
    @scene("a 0:2")
    async def story(it):
        reader = await it.read(8)
        stranger = Stranger(it, 8)
        await stranger.open()
        await stranger.send(ROW, payload_bytes=3)
        message = (await stranger.rows.receive())[0]
        assert isinstance(message, Error)
        assert message.code == "protocol"
        with pytest.raises(PeerUnreachable):
            await stranger.rows.receive()
        await reader.decode(5)
        await stranger.close()

    story()
