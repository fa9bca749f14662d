"""What a TCP dialler may meet."""

from __future__ import annotations

import asyncio
import gc
import ssl
import tempfile

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from shoal.base.errors import (
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
)
from shoal.net.address import Address
from shoal.net.certificate import (
    certificate_of,
    server_context,
)
from shoal.net.identity import Identity
from shoal.net.tcp import TcpTransport
from tests.contracts.transport_cases import open_pair, run
from tests.unit.tcp_cases import (
    SHORT_S,
    Rogue,
    hang_up,
    read_to_end,
)

# --- what a dialler meets -----------------------------------------------------


def rogue_context(key: str) -> ssl.SSLContext:
    """A TLS server whose certificate is of another kind of key."""
    if key == "ed25519":
        return server_context(Identity.generate())
    secret = generate_private_key(SECP256R1())
    honest = certificate_of(Identity.generate())
    certificate = (
        x509.CertificateBuilder(honest.issuer, honest.subject, secret.public_key(), 1)
        .not_valid_before(honest.not_valid_before_utc)
        .not_valid_after(honest.not_valid_after_utc)
        .sign(secret, SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pem = secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    load(context, pem + certificate.public_bytes(Encoding.PEM))
    return context


def load(context: ssl.SSLContext, pem: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)


async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_to_end(reader)
    await hang_up(writer)


async def hang_up_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await hang_up(writer)


async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    await nothing(reader, writer)


ROGUES: dict[str, tuple[Rogue, str, type[Exception]]] = {
    "silent": (nothing, "", PeerTimeout),
    "hangs up": (hang_up_at_once, "", PeerUnreachable),
    "speaks something else": (babble, "", PeerMisbehaved),
    "other peer": (nothing, "ed25519", PeerMisbehaved),
    "other kind of key": (nothing, "ecdsa", PeerMisbehaved),
}


@pytest.mark.parametrize("name", ROGUES)
def test_a_dialler_tells_what_is_wrong(name: str) -> None:
    rogue, key, expected = ROGUES[name]

    async def work() -> None:
        client = TcpTransport(Identity.generate(), handshake_timeout_s=SHORT_S)
        context = rogue_context(key) if key else None
        server = await asyncio.start_server(rogue, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(expected):
                await client.dial(Address("tcp", Identity.generate().peer, "127.0.0.1", port))
        await client.close()
        await others_gone()

    run(work())


async def others_gone() -> None:
    """Wait for the tasks of asyncio's own stream server."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


@pytest.mark.parametrize("nonce_bytes", [0, 5])
def test_a_listener_that_leaves_before_its_nonce(nonce_bytes: int) -> None:
    identity = Identity.generate()

    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(nonce_bytes))
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    async def work() -> None:
        client = TcpTransport(Identity.generate())
        async with await asyncio.start_server(
            leave, "127.0.0.1", 0, ssl=server_context(identity)
        ) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(PeerUnreachable):
                await client.dial(Address("tcp", identity.peer, "127.0.0.1", port))
        await client.close()
        await others_gone()

    run(work())


def test_a_host_that_is_no_name_is_unreachable() -> None:
    async def work() -> None:
        client = TcpTransport(Identity.generate())
        with pytest.raises(PeerUnreachable):
            await client.dial(Address("tcp", Identity.generate().peer, "a..b", 1))
        await client.close()

    run(work())


def test_a_cancelled_dial_leaves_nothing_behind() -> None:
    async def work() -> None:
        async with open_pair("tcp") as pair:
            for steps in range(0, 40, 3):
                dialling = asyncio.create_task(pair.near.dial(pair.listener.address))
                for _ in range(steps):
                    await asyncio.sleep(0)
                dialling.cancel()
                await asyncio.gather(dialling, return_exceptions=True)
            near = await pair.near.dial(pair.listener.address)
            await near.send(b"fine")

    run(work())
    gc.collect()


def test_closing_the_transport_ends_its_dials() -> None:
    """Whatever step a dial has reached, it fails or its stream is closed."""

    async def work() -> None:
        for steps in range(0, 40, 4):
            async with open_pair("tcp") as pair:
                dialling = asyncio.create_task(pair.near.dial(pair.listener.address))
                for _ in range(steps):
                    await asyncio.sleep(0)
                await pair.near.close()
                with pytest.raises(PeerUnreachable):
                    await (await dialling).receive()

    run(work())
