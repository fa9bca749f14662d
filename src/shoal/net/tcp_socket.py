"""Sockets: where to listen, and how they are set up."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from typing import Final

from shoal.base.errors import ConfigError
from shoal.net.address import ListenAddress

KEEPALIVE_IDLE_S: Final = 15
KEEPALIVE_INTERVAL_S: Final = 5
KEEPALIVE_PROBES: Final = 3
"""A silent machine that lost power is noticed after 30 s even if nobody asks it anything."""

UNACKNOWLEDGED_MS: Final = 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_PROBES * KEEPALIVE_INTERVAL_S)
"""The same where bytes are under way to it: the kernel would send them again for 15 minutes, and
keep-alive probes don't count meanwhile (RFC 5482)."""

BACKLOG: Final = 512
"""Connections that wait in the kernel to be accepted."""

_ELSEWHERE: Final = {
    socket.AF_INET: ("192.0.2.1", 9),
    socket.AF_INET6: ("2001:db8::1", 9),
}
"""Addresses reserved for documentation (RFC 5737, RFC 3849): never sent to, only routed."""


def tune(sock: socket.socket) -> None:
    """Send small frames at once, and notice dead machines."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPALIVE", KEEPALIVE_IDLE_S),  # what macOS calls it
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),  # Linux only
    ):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def listening_socket(where: ListenAddress) -> socket.socket:
    """A bound socket that listens, on the first address that the host name has.

    Raises:
        ConfigError: unknown host, or the port is taken or not ours to use.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, place = found[0]
        is_any_v6 = family == socket.AF_INET6 and _is_wildcard(where.host)
        ear = socket.create_server(
            (str(place[0]), int(place[1])),
            family=family,
            backlog=BACKLOG,
            dualstack_ipv6=is_any_v6 and socket.has_dualstack_ipv6(),
        )
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"can't listen on {where}: {error} (choose another port, or 0 for any free one)"
        ) from error
    ear.setblocking(False)
    return ear


def reachable_host(host: str) -> str:
    """`host`, or for a wildcard the address that this machine uses towards others.

    Loopback where no route leads to others: who announces a wildcard looks for other addresses,
    and refuses where there are none (`cli/own_addresses.py`).
    """
    if not _is_wildcard(host):
        return host
    for family in (socket.AF_INET, socket.AF_INET6):
        if family == socket.AF_INET6 or ":" not in host or socket.has_dualstack_ipv6():
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as probe:
                    probe.connect(_ELSEWHERE[family])  # chooses a route; sends nothing
                    return str(probe.getsockname()[0])
            except OSError:
                continue
    return "127.0.0.1"


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
