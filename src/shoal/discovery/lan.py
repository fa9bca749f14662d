"""Servers on the local network: announced and found by multicast DNS, without any address.

What is found this way is only where to dial: a server still proves its key and its
membership, and its record is checked like any other. Announced are peer id, swarm, model,
host and port, which everybody in the network can read; never an invite.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

import ifaddr
from zeroconf import (
    Error as ZeroconfError,
)
from zeroconf import (
    InterfaceChoice,
    IPVersion,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from shoal.base.errors import ConfigError, PeerUnreachable
from shoal.base.ids import PeerId, parse_peer, peer_text
from shoal.net.address import Address

logger = logging.getLogger(__name__)

SERVICE: Final = "_shoal._tcp.local."
"""The service type, as RFC 6763 names them."""

SCHEME: Final = "tcp"

FOUND_MAX: Final = 16
"""Servers that are taken as joins; they name the others. Anybody may claim more."""

BROWSE_S: Final = 5.0
"""How long to look for the first server: it answers within 1 s unless packets are lost."""

GATHER_S: Final = 0.5
"""How long to look for others when one is found: two are read, one alone could lie."""

RESOLVE_MS: Final = 2000
"""How long to wait for a found server's port and peer id."""

_ANY_HOSTS: Final = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanNotice:
    """What a server tells its local network."""

    peer: PeerId
    hosts: tuple[str, ...]
    """IPv4 addresses."""
    port: int
    swarm: str
    model: str

    def properties(self) -> dict[str, str]:
        """The notice's text entries; readers ignore entries they don't know."""
        return {"peer": peer_text(self.peer), "swarm": self.swarm, "model": self.model}


def addresses_in(
    properties: Mapping[bytes, bytes | None], hosts: Iterable[str], port: int | None, swarm: str
) -> tuple[Address, ...]:
    """Where a found server can be dialled; empty if it is of another swarm or makes no sense."""
    try:
        texts = {key.decode(): (value or b"").decode() for key, value in properties.items()}
        peer = parse_peer(texts.get("peer", ""))
    except (UnicodeDecodeError, ConfigError) as error:
        logger.info("notice ignored reason=%s", error)
        return ()
    if texts.get("swarm") != swarm or not port:
        return ()
    return tuple(Address(SCHEME, peer, host, port) for host in hosts)


def lan_hosts(listen_host: str) -> tuple[str, ...]:
    """The IPv4 addresses at which others of the local network reach a server.

    `listen_host` is where it listens; a wildcard means every interface but loopback.

    Raises:
        ConfigError: not an IPv4 address, or no network.
    """
    if listen_host not in _ANY_HOSTS:
        try:
            return (str(IPv4Address(listen_host)),)
        except ValueError as error:
            raise ConfigError(
                f"--lan with --listen on {listen_host!r}: write an IPv4 address, or 0.0.0.0"
            ) from error
    found = [IPv4Address(ip.ip) for adapter in ifaddr.get_adapters() for ip in adapter.ips
             if isinstance(ip.ip, str)]  # fmt: skip
    hosts = tuple(str(ip) for ip in found if not ip.is_loopback)
    if not hosts:
        raise ConfigError("--lan: this machine has no IPv4 address but its own; is it connected?")
    return hosts


@asynccontextmanager
async def announced_on_lan(
    notice: LanNotice, interfaces: Sequence[str] | None = None
) -> AsyncIterator[None]:
    """Tell the local network about a server; takes the notice back in the end.

    `interfaces` are IPv4 addresses of our own (default: the notice's hosts).

    Raises:
        ConfigError: this machine can't send multicasts there.
    """
    label = peer_text(notice.peer)[:32]
    info = ServiceInfo(
        SERVICE,
        f"{label}.{SERVICE}",
        addresses=[socket.inet_aton(host) for host in notice.hosts],
        port=notice.port,
        properties=notice.properties(),
        server=f"{label}.local.",
    )
    async with _open(list(interfaces or notice.hosts)) as zeroconf:
        try:
            await (await zeroconf.async_register_service(info, allow_name_change=True))
        except ZeroconfError as error:
            raise ConfigError(f"--lan: can't announce this server: {error!r}") from error
        logger.info("announced on the local network hosts=%s", ",".join(notice.hosts))
        try:
            yield
        finally:
            await (await zeroconf.async_unregister_service(info))


async def find_on_lan(
    swarm: str,
    interfaces: Sequence[str] | None = None,
    *,
    browse_s: float = BROWSE_S,
    gather_s: float = GATHER_S,
) -> tuple[Address, ...]:
    """The servers of a swarm that answer in the local network; maybe none.

    `interfaces` are IPv4 addresses of our own (default: all).

    Raises:
        ConfigError: this machine can't send multicasts.
    """
    found: dict[PeerId, tuple[Address, ...]] = {}
    clock = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout(browse_s) as deadline:

            def on_found(addresses: tuple[Address, ...]) -> None:
                if not found:
                    deadline.reschedule(clock() + gather_s)
                if len(found) < FOUND_MAX:
                    found.setdefault(addresses[0].peer, addresses)

            await watch_lan(swarm, on_found, interfaces)
    except TimeoutError:
        logger.info("looked at the local network swarm=%s found=%d", swarm, len(found))
    return tuple(address for addresses in found.values() for address in addresses)


async def watch_lan(
    swarm: str,
    on_found: Callable[[tuple[Address, ...]], None],
    interfaces: Sequence[str] | None = None,
) -> None:
    """Call `on_found` with the addresses of each server of a swarm, until cancelled.

    Raises:
        ConfigError: this machine can't send multicasts.
    """
    names: asyncio.Queue[str] = asyncio.Queue(maxsize=4 * FOUND_MAX)

    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Added and not names.full():
            names.put_nowait(name)

    async with _open(InterfaceChoice.All if interfaces is None else list(interfaces)) as zeroconf:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[on_change])
        try:
            while True:
                addresses = await _resolve(zeroconf.zeroconf, await names.get(), swarm)
                if addresses:
                    on_found(addresses)
        finally:
            await browser.async_cancel()


def none_found(swarm: str) -> PeerUnreachable:
    """What to tell a person whose local network has no such server."""
    return PeerUnreachable(
        f"no server of swarm {swarm!r} answers in the local network: start one with "
        "shoal serve --lan, allow UDP port 5353 in the firewall, or name one by --join"
    )


async def _resolve(zeroconf: Zeroconf, name: str, swarm: str) -> tuple[Address, ...]:
    info = AsyncServiceInfo(SERVICE, name)
    if not await info.async_request(zeroconf, RESOLVE_MS):
        return ()
    return addresses_in(info.properties, info.parsed_addresses(IPVersion.V4Only), info.port, swarm)


@asynccontextmanager
async def _open(interfaces: list[str] | InterfaceChoice) -> AsyncIterator[AsyncZeroconf]:
    try:
        zeroconf = AsyncZeroconf(interfaces=interfaces, ip_version=IPVersion.V4Only)
    except OSError as error:
        raise ConfigError(f"--lan: no multicast on this machine: {error}") from error
    try:
        yield zeroconf
    finally:
        await zeroconf.async_close()
