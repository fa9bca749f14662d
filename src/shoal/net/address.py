"""Where a peer can be dialled: `tcp://PEERID@HOST:PORT`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId, parse_peer, peer_text

_ADDRESS = re.compile(
    r"(?P<scheme>[a-z]+)://(?:(?P<peer>[^@/]+)@)?(?P<host>\[[0-9a-fA-F:.%]+\]|[^:/@\[\]]+)"
    r":(?P<port>\d{1,5})"
)


@dataclass(frozen=True, slots=True)
class Address:
    """Scheme, host and port of a peer, with the identity it must prove."""

    scheme: str
    peer: PeerId
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{peer_text(self.peer)}@{_bracket(self.host)}:{self.port}"


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Scheme, host and port to listen on; port 0 picks a free one."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{_bracket(self.host)}:{self.port}"


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _parts(text: str, example: str) -> tuple[str, str | None, str, int]:
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"not an address: {text!r} (write {example})")
    port = int(match["port"])
    if port > 65_535:
        raise ConfigError(f"port {port} in {text!r} is above 65535")
    return match["scheme"], match["peer"], match["host"].strip("[]"), port


def parse_address(text: str) -> Address:
    """A dialable address, as a server's ready line prints it.

    Raises:
        ConfigError: malformed, or the peer id is missing.
    """
    example = "tcp://PEERID@HOST:PORT, as the server's ready line prints it"
    scheme, peer, host, port = _parts(text, example)
    if peer is None:
        raise ConfigError(f"no peer id in {text!r} (write {example})")
    return Address(scheme, parse_peer(peer), host, port)


def parse_listen(text: str) -> ListenAddress:
    """An address to listen on.

    Raises:
        ConfigError: malformed, or with a peer id (a server knows its own).
    """
    scheme, peer, host, port = _parts(text, "tcp://HOST:PORT, port 0 for any free one")
    if peer is not None:
        raise ConfigError(f"an address to listen on has no peer id: {text!r}")
    return ListenAddress(scheme, host, port)
