"""What strangers may send to a TCP listener."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.base.errors import (
    ConfigError,
    InternalError,
    MessageTooLarge,
)
from shoal.base.ids import PeerId
from shoal.base.limits import PAYLOAD_BYTES_MAX
from shoal.net import tcp
from shoal.net.address import Address, ListenAddress
from shoal.net.certificate import (
    certificate_of,
    der_of,
    peer_of_certificate,
    server_context,
)
from shoal.net.identity import HANDSHAKE, Identity, verify
from shoal.net.tcp import NONCE_BYTES, TcpTransport, statement
from shoal.net.tcp_socket import reachable_host
from shoal.net.tcp_stream import TcpStream
from shoal.net.transport import Stream
from shoal.wire.frames import PREFIX, encode_frame
from tests.contracts.transport_cases import open_pair, run
from tests.unit.tcp_cases import (
    LOOPBACK,
    SHORT_S,
    check_serves,
    echo,
    hang_up,
    proof,
    raw_connection,
    read_to_end,
)

# --- what a listener meets ----------------------------------------------------


async def send_and_see_the_end(address: Address, data: bytes, *, tls: bool) -> None:
    """Send bytes; the listener hangs up by itself, no later than its deadline."""
    reader, writer = await raw_connection(address, tls=tls)
    writer.write(data)
    await read_to_end(reader)
    await hang_up(writer)


GARBAGE = {
    "plaintext": (b"GET / HTTP/1.1\r\n\r\n", False),
    "plaintext frame": (b"".join(bytes(part) for part in encode_frame(b"hello")), False),
    "TLS record of nonsense": (b"\x16\x03\x01\x00\x05hello" + bytes(40), False),
    "nothing": (b"", False),
    "half a TLS record": (b"\x16\x03\x01\x02\x00\x01", False),
    "nothing inside TLS": (b"", True),
    "half a proof": (b"x" * 50, True),
    "a false proof": (b"x" * 96, True),
    "a proof of zeros": (bytes(96), True),
    "more than a proof": (b"x" * 200_000, True),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_refused_and_others_are_served(name: str) -> None:
    data, tls = GARBAGE[name]

    async def work() -> None:
        server = TcpTransport(Identity.generate(), handshake_timeout_s=SHORT_S)
        listener = await server.listen(LOOPBACK, echo)
        await send_and_see_the_end(listener.address, data, tls=tls)
        await check_serves(listener)
        await server.close()

    run(work())


def test_a_slow_stranger_is_dropped_while_others_are_served() -> None:
    async def work() -> None:
        server = TcpTransport(Identity.generate(), handshake_timeout_s=SHORT_S)
        listener = await server.listen(LOOPBACK, echo)
        slow = [await raw_connection(listener.address, tls=tls) for tls in (False, True)]
        await check_serves(listener)
        for reader, writer in slow:
            await read_to_end(reader)
            await hang_up(writer)
        await server.close()

    run(work())


def test_too_many_silent_strangers_drop_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "UNPROVEN_MAX", 3)

    async def work() -> None:
        server = TcpTransport(Identity.generate())
        listener = await server.listen(LOOPBACK, echo)
        silent = [await raw_connection(listener.address, tls=False) for _ in range(6)]
        for reader, _ in silent[:3]:
            assert await read_to_end(reader) == b""
        await check_serves(listener)
        for _, writer in silent:
            await hang_up(writer)
        await server.close()

    run(work())


def test_an_honest_proof_is_accepted_once_and_a_replayed_one_never() -> None:
    identity, server_identity = Identity.generate(), Identity.generate()

    async def work() -> None:
        server = TcpTransport(server_identity)
        listener = await server.listen(LOOPBACK, echo)
        frame = b"".join(bytes(part) for part in encode_frame(b"hello"))

        reader, writer = await raw_connection(listener.address, tls=True)
        recorded = proof(identity, server_identity, await reader.readexactly(NONCE_BYTES))
        writer.write(recorded + frame)
        assert await reader.readexactly(len(frame)) == frame
        await hang_up(writer)

        reader, writer = await raw_connection(listener.address, tls=True)
        await reader.readexactly(NONCE_BYTES)
        writer.write(recorded + frame)
        assert await read_to_end(reader) == b""
        await hang_up(writer)
        await check_serves(listener)
        await server.close()

    run(work())


def test_a_proof_for_another_listener_is_refused() -> None:
    """A listener in the middle can't pass a dialler's proof on."""
    identity, server_identity = Identity.generate(), Identity.generate()

    async def work() -> None:
        server = TcpTransport(server_identity)
        listener = await server.listen(LOOPBACK, echo)
        reader, writer = await raw_connection(listener.address, tls=True)
        nonce = await reader.readexactly(NONCE_BYTES)
        writer.write(proof(identity, Identity.generate(), nonce))
        assert await read_to_end(reader) == b""
        await hang_up(writer)
        await server.close()

    run(work())


def test_a_recorded_connection_is_worth_nothing() -> None:
    """All bytes that an honest dialler sent, sent again to the same listener."""

    async def work() -> None:
        server, client = (TcpTransport(Identity.generate()) for _ in range(2))
        served: list[PeerId] = []

        async def count(stream: Stream) -> None:
            served.append(stream.peer)
            await echo(stream)

        listener = await server.listen(LOOPBACK, count)
        recorded = bytearray()

        async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await raw_connection(listener.address, tls=False)

            async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                while data := await source.read(65_536):
                    if source is reader:
                        recorded.extend(data)
                    sink.write(data)
                sink.write_eof()

            await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))
            await hang_up(there[1])
            await hang_up(writer)

        async with await asyncio.start_server(record, "127.0.0.1", 0) as proxy:
            port = proxy.sockets[0].getsockname()[1]
            stream = await client.dial(Address("tcp", server.peer, "127.0.0.1", port))
            await stream.send(b"once")
            assert (await stream.receive()).header == b"once"
            await client.close()
        await send_and_see_the_end(listener.address, bytes(recorded), tls=False)
        assert served == [client.peer]
        await check_serves(listener)
        await server.close()

    run(work())


def test_a_frame_over_the_limits_ends_only_that_stream() -> None:
    identity, server_identity = Identity.generate(), Identity.generate()
    failures: list[Exception] = []

    async def note(stream: Stream) -> None:
        try:
            await echo(stream)
        except MessageTooLarge as error:
            failures.append(error)
            raise

    async def work() -> None:
        server = TcpTransport(server_identity)
        listener = await server.listen(LOOPBACK, note)
        reader, writer = await raw_connection(listener.address, tls=True)
        writer.write(proof(identity, server_identity, await reader.readexactly(NONCE_BYTES)))
        writer.write(PREFIX.pack(10, PAYLOAD_BYTES_MAX + 1) + bytes(10))
        assert await read_to_end(reader) == b""
        await hang_up(writer)
        assert len(failures) == 1
        await check_serves(listener)
        await server.close()

    run(work())


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chunks=st.lists(st.binary(max_size=2_000), max_size=5), tls=st.booleans())
def test_no_bytes_of_a_stranger_stop_the_listener(chunks: list[bytes], tls: bool) -> None:
    async def work() -> None:
        server = TcpTransport(Identity.generate(), handshake_timeout_s=SHORT_S)
        listener = await server.listen(LOOPBACK, echo)
        reader, writer = await raw_connection(listener.address, tls=tls)
        for chunk in chunks:
            writer.write(chunk)
        if writer.can_write_eof():
            writer.write_eof()
        else:
            writer.close()
        await read_to_end(reader)
        await hang_up(writer)
        await check_serves(listener)
        await server.close()

    run(work())


@settings(max_examples=6, deadline=None)
@given(chunks=st.lists(st.binary(max_size=2_000), max_size=5))
def test_no_bytes_of_a_proven_peer_stop_the_listener(chunks: list[bytes]) -> None:
    identity, server_identity = Identity.generate(), Identity.generate()

    async def work() -> None:
        server = TcpTransport(server_identity)
        listener = await server.listen(LOOPBACK, echo)
        reader, writer = await raw_connection(listener.address, tls=True)
        writer.write(proof(identity, server_identity, await reader.readexactly(NONCE_BYTES)))
        for chunk in chunks:
            writer.write(chunk)
        writer.close()
        await read_to_end(reader)
        await hang_up(writer)
        await check_serves(listener)
        await server.close()

    run(work())


def test_a_dead_socket_does_not_stop_the_listener() -> None:
    async def work() -> None:
        server = TcpTransport(Identity.generate())
        listener = await server.listen(LOOPBACK, echo)
        for _ in range(5):
            _, writer = await raw_connection(listener.address, tls=False)
            await hang_up(writer)
        await check_serves(listener)
        await server.close()

    run(work())


# --- the small parts ----------------------------------------------------------


def test_only_tls_1_3_is_spoken() -> None:
    async def work() -> None:
        async with open_pair("tcp") as pair:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            address = pair.listener.address
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(
                    address.host, address.port, ssl=context, server_hostname=""
                )

    run(work())


def test_a_certificate_is_the_same_for_the_same_key() -> None:
    identity = Identity.generate()
    der = der_of(certificate_of(identity))
    assert der == der_of(certificate_of(identity))
    assert peer_of_certificate(der) == identity.peer
    assert peer_of_certificate(b"nonsense") is None
    assert peer_of_certificate(b"") is None


def test_the_key_is_on_no_disk_after_the_context_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    server_context(Identity.generate())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("server.example", "server.example")],
)
def test_reachable_host_keeps_a_name(host: str, expected: str) -> None:
    assert reachable_host(host) == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_wildcard_is_announced_as_an_address_that_can_be_dialled(host: str) -> None:
    async def work() -> None:
        server, client = (TcpTransport(Identity.generate()) for _ in range(2))
        listener = await server.listen(ListenAddress("tcp", host, 0), echo)
        assert listener.address.host not in ("0.0.0.0", "::")
        stream = await client.dial(listener.address)
        await stream.send(b"hello")
        assert (await stream.receive()).header == b"hello"
        await asyncio.gather(client.close(), server.close())

    if host == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    run(work())


@pytest.mark.parametrize("host", ["a..b", "192.0.2.1"])
def test_a_host_that_is_not_ours_is_a_configuration_error(host: str) -> None:
    async def work() -> None:
        server = TcpTransport(Identity.generate())
        with pytest.raises(ConfigError, match="can't listen"):
            await server.listen(ListenAddress("tcp", host, 0), echo)
        await server.close()

    run(work())


def test_small_frames_leave_at_once() -> None:
    async def work() -> None:
        async with open_pair("tcp") as pair:
            for end in await pair.connect():
                assert isinstance(end, TcpStream)
                sock = end._connected().get_extra_info("socket")
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                if sys.platform == "linux":  # else the kernel tries for 15 minutes
                    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000

    run(work())


def test_a_second_reader_or_writer_is_our_bug() -> None:
    async def work() -> None:
        async with open_pair("tcp") as pair:
            near, _ = await pair.connect()
            first = asyncio.create_task(near.receive())
            feeding = asyncio.create_task(near.send(b"", bytes(PAYLOAD_BYTES_MAX)))
            for _ in range(3):
                await asyncio.sleep(0)
            with pytest.raises(InternalError):
                await near.receive()
            with pytest.raises(InternalError):
                await near.send(b"")
            near.close()
            await asyncio.gather(first, feeding, return_exceptions=True)

    run(work())


def test_a_stream_without_a_connection_is_our_bug() -> None:
    async def work() -> None:
        stream = TcpStream()
        with pytest.raises(InternalError):
            _ = stream.peer
        with pytest.raises(InternalError):
            stream.write_raw(b"")
        stream.close()
        await stream.wait_lost(0)

    run(work())


def test_a_proof_says_which_context_it_is_for() -> None:
    identity = Identity.generate()
    message = statement(b"certificate", bytes(32))
    signature = identity.sign(HANDSHAKE, message)
    assert verify(identity.peer, HANDSHAKE, message, signature)
    assert not verify(identity.peer, "route", message, signature)


def test_refusals_are_logged_but_not_loudly(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        server = TcpTransport(Identity.generate(), handshake_timeout_s=SHORT_S)
        listener = await server.listen(LOOPBACK, echo)
        data = random.Random(4).randbytes(300)
        await send_and_see_the_end(listener.address, data, tls=False)
        await check_serves(listener)
        await server.close()

    with caplog.at_level(logging.INFO):
        run(work())
    assert "handshake failed" in caplog.text
    assert all(record.levelno <= logging.INFO for record in caplog.records)
