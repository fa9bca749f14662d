"""What the tests of the TCP transport share."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

from shoal.net.address import Address, ListenAddress
from shoal.net.certificate import (
    certificate_of,
    client_context,
    der_of,
)
from shoal.net.identity import HANDSHAKE, Identity
from shoal.net.tcp import TcpListener, TcpTransport, statement
from shoal.net.transport import Stream

LOOPBACK = ListenAddress("tcp", "127.0.0.1", 0)
SHORT_S = 0.5
"""The listener's deadline where a test waits for it; an honest handshake takes 3 ms."""

Rogue = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(stream: Stream) -> None:
    while True:
        frame = await stream.receive()
        await stream.send(frame.header, frame.payload)


async def check_serves(listener: TcpListener) -> None:
    """The listener still serves an honest stranger."""
    honest = TcpTransport(Identity.generate())
    stream = await honest.dial(listener.address)
    await stream.send(b"honest")
    assert (await stream.receive()).header == b"honest"
    await honest.close()


async def raw_connection(
    address: Address, *, tls: bool
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = client_context() if tls else None
    name = "" if tls else None
    return await asyncio.open_connection(
        address.host, address.port, ssl=context, server_hostname=name
    )


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(-1)
    except (ConnectionError, ssl.SSLError):
        return b""


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def proof(identity: Identity, server: Identity, nonce: bytes) -> bytes:
    """What an honest dialler with this identity says."""
    certificate = der_of(certificate_of(server))
    return identity.peer + identity.sign(HANDSHAKE, statement(certificate, nonce))
