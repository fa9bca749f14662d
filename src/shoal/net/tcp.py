"""The TCP transport: one TLS 1.3 connection per stream.

Who proves what, in order:

1. The listener's certificate is self-signed on its own key; TLS proves that it holds the
   key, and the dialler compares the key with the peer id in the address (`certificate.py`).
2. The listener sends a fresh nonce of 32 bytes.
3. The dialler sends its peer id (32 bytes) and a signature (64 bytes) over the hash of the
   listener's certificate and the nonce. The hash keeps a listener from passing our proof on
   to somebody else, the nonce keeps it from being used twice.

Only then frames travel (`tcp_stream.py`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import socket
import ssl
from collections.abc import Callable
from typing import Final
from weakref import WeakSet

from shoal.base.errors import (
    ConfigError,
    PeerMisbehaved,
    PeerTimeout,
    PeerUnreachable,
    ShoalError,
)
from shoal.base.ids import PEER_ID_BYTES, PeerId, short
from shoal.base.limits import DIAL_TIMEOUT_S
from shoal.net.address import Address, ListenAddress
from shoal.net.certificate import (
    certificate_of,
    client_context,
    der_of,
    peer_of_certificate,
    server_context,
)
from shoal.net.identity import HANDSHAKE, SIGNATURE_BYTES, Identity, verify
from shoal.net.sent_rate import SentRates
from shoal.net.tasks import TaskSet
from shoal.net.tcp_socket import listening_socket, reachable_host, tune
from shoal.net.tcp_stream import TcpStream
from shoal.net.transport import StreamHandler

logger = logging.getLogger(__name__)

SCHEME: Final = "tcp"

NONCE_BYTES: Final = 32

UNPROVEN_MAX: Final = 256
"""Connections that have not proved an identity yet. One more drops the oldest, so that a
flood of silent connections can't keep quick ones out; 256 hold at most 16 MiB."""

CLOSE_GRACE_S: Final = 1.0
"""A closed connection has this long to flush and to hear the other side's farewell."""

ACCEPT_RETRY_S: Final = 0.5
"""Pause when the system has no file descriptors left."""


class TcpTransport:
    """Dials and listens over TCP as one identity. Implements Transport."""

    def __init__(self, identity: Identity, *, handshake_timeout_s: float = DIAL_TIMEOUT_S) -> None:
        self._identity = identity
        self._peer = identity.peer
        self._handshake_timeout_s = handshake_timeout_s
        self._client_context: ssl.SSLContext | None = None
        self._server_context: ssl.SSLContext | None = None
        self._rates = SentRates()
        self._streams: WeakSet[TcpStream] = WeakSet()
        self._dialled: set[TcpStream] = set()
        self._listeners: list[TcpListener] = []
        self._is_closed = False

    @property
    def peer(self) -> PeerId:
        """Our own identity."""
        return self._peer

    def sent_bytes_per_s(self) -> float | None:
        """The rate at which others take our bytes, as the system saw it; None: not known."""
        for stream in tuple(self._streams):
            stream.note_rate()
        return self._rates.typical_bytes_per_s

    async def dial(self, address: Address) -> TcpStream:
        """A stream to `address.peer`; see Transport.dial."""
        if address.scheme != SCHEME:
            raise PeerUnreachable(f"{address} is no tcp address: dial it by its own transport")
        if self._is_closed:
            raise PeerUnreachable("our own transport is closed")
        stream = self._stream()
        try:
            async with asyncio.timeout(self._handshake_timeout_s):
                await self._connect(stream, address)
                await self._prove(stream, address)
        except BaseException as error:
            stream.abort()
            if isinstance(error, TimeoutError):
                limit_s = self._handshake_timeout_s
                raise PeerTimeout(f"no handshake with {address} in {limit_s:g} s") from error
            raise
        return stream

    def _stream(self) -> TcpStream:
        stream = TcpStream(self._rates)
        self._streams.add(stream)
        return stream

    async def _connect(self, stream: TcpStream, address: Address) -> None:
        self._client_context = self._client_context or client_context()
        try:
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: stream,
                address.host,
                address.port,
                ssl=self._client_context,
                server_hostname="",
                ssl_handshake_timeout=self._handshake_timeout_s,
                ssl_shutdown_timeout=CLOSE_GRACE_S,
            )
        except ssl.SSLError as error:
            raise PeerMisbehaved(f"{address} does not speak TLS 1.3: {error}") from error
        except TimeoutError:
            raise
        except (OSError, UnicodeError) as error:
            raise PeerUnreachable(f"can't reach {address}: {error}") from error
        tune(transport.get_extra_info("socket"))
        self._dialled.add(stream)
        stream.lost.add_done_callback(lambda _: self._dialled.discard(stream))
        if self._is_closed:
            raise PeerUnreachable("our own transport is closed")

    async def _prove(self, stream: TcpStream, address: Address) -> None:
        certificate = stream.certificate
        if peer_of_certificate(certificate) != address.peer:
            raise PeerMisbehaved(f"somebody else answers at {address}: the peer id differs")
        nonce = await stream.read_raw(NONCE_BYTES)
        signature = self._identity.sign(HANDSHAKE, statement(certificate, nonce))
        stream.write_raw(self._peer + signature)
        stream.start_frames(address.peer)

    async def listen(self, where: ListenAddress, handler: StreamHandler) -> TcpListener:
        """Serve strangers' streams with `handler`; see Transport.listen."""
        if where.scheme != SCHEME:
            raise ConfigError(f"can't listen on {where} over tcp (write tcp://HOST:PORT)")
        if self._is_closed:
            raise ConfigError("this transport is closed: make a new one")
        self._server_context = self._server_context or server_context(self._identity)
        ear = await listening_socket(where)
        address = Address(SCHEME, self._peer, reachable_host(where.host), ear.getsockname()[1])
        gate = _Gate(self._identity, self._server_context, self._handshake_timeout_s)
        listener = TcpListener(ear, address, gate, handler, self._stream)
        self._listeners.append(listener)
        return listener

    async def close(self) -> None:
        """Close all streams and listeners, and wait for the handlers to end."""
        self._is_closed = True
        streams = list(self._dialled)
        for stream in streams:
            stream.close()
        waits = [stream.wait_lost(CLOSE_GRACE_S) for stream in streams]
        await asyncio.gather(*waits, *(listener.close() for listener in self._listeners))


class _Gate:
    """Turns accepted sockets into streams of proven peers."""

    def __init__(self, identity: Identity, context: ssl.SSLContext, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._certificate = der_of(certificate_of(identity))

    async def admit(self, stream: TcpStream, sock: socket.socket) -> None:
        """Make `stream` one of a proven peer.

        Raises:
            TimeoutError, OSError: the other side left, was too slow, or speaks no TLS 1.3.
            PeerMisbehaved, PeerUnreachable: it could not prove its identity.
        """
        async with asyncio.timeout(self._timeout_s):
            tune(sock)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: stream,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=self._timeout_s,
                ssl_shutdown_timeout=CLOSE_GRACE_S,
            )
            nonce = os.urandom(NONCE_BYTES)
            stream.write_raw(nonce)
            peer = PeerId(await stream.read_raw(PEER_ID_BYTES))
            signature = await stream.read_raw(SIGNATURE_BYTES)
            if not verify(peer, HANDSHAKE, statement(self._certificate, nonce), signature):
                raise PeerMisbehaved(f"no valid proof of the peer id {short(peer)}")
            stream.start_frames(peer)


class TcpListener:
    """An open TCP port. Implements Listener."""

    def __init__(
        self,
        ear: socket.socket,
        address: Address,
        gate: _Gate,
        handler: StreamHandler,
        new_stream: Callable[[], TcpStream],
    ) -> None:
        self._ear = ear
        self._address = address
        self._gate = gate
        self._handler = handler
        self._new_stream = new_stream
        self._tasks = TaskSet(f"tcp-listener-{address.port}")
        self._unproven: dict[asyncio.Task[None], None] = {}
        self._tasks.spawn(self._accept(), "accept")

    @property
    def address(self) -> Address:
        """Where others can dial us; the port is the real one."""
        return self._address

    async def close(self) -> None:
        """Stop listening, close every stream that came in here, end their handlers."""
        try:
            await self._tasks.close()
        finally:
            self._ear.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, remote = await loop.sock_accept(self._ear)
            except OSError as error:
                logger.warning("accept failed port=%d error=%s", self._address.port, error)
                await asyncio.sleep(ACCEPT_RETRY_S)
                continue
            sock.setblocking(False)
            self._spawn(sock, f"{remote[0]}:{remote[1]}")

    def _spawn(self, sock: socket.socket, remote: str) -> None:
        if len(self._unproven) >= UNPROVEN_MAX:
            oldest = next(iter(self._unproven))
            del self._unproven[oldest]
            oldest.cancel()
            logger.info("too many unproven connections: dropped the oldest")
        task = self._tasks.spawn(self._serve(sock, remote), remote)
        self._unproven[task] = None
        task.add_done_callback(lambda done: self._on_done(done, sock))

    def _on_done(self, task: asyncio.Task[None], sock: socket.socket) -> None:
        self._unproven.pop(task, None)
        sock.close()  # asyncio has done so, unless the task never began

    async def _serve(self, sock: socket.socket, remote: str) -> None:
        stream = self._new_stream()
        try:
            await self._gate.admit(stream, sock)
        except (OSError, ShoalError) as error:
            logger.info("handshake failed remote=%s reason=%r", remote, error)
            await stream.wait_lost(0)
            return
        except asyncio.CancelledError:
            stream.abort()
            raise
        finally:
            task = asyncio.current_task()
            if task is not None:
                self._unproven.pop(task, None)
        try:
            await self._handler(stream)
        except PeerUnreachable as error:
            logger.debug("stream ended peer=%s reason=%s", short(stream.peer), error)
        except ShoalError as error:
            logger.info("stream ended peer=%s reason=%r", short(stream.peer), error)
        except Exception:  # a task's top: one stream never stops the listener
            logger.exception("stream handler failed peer=%s", short(stream.peer))
        finally:
            stream.close()
            await stream.wait_lost(CLOSE_GRACE_S)


def statement(certificate: bytes, nonce: bytes) -> bytes:
    """What a dialler signs to prove its peer id to the listener with this certificate."""
    return hashlib.sha256(certificate).digest() + nonce
