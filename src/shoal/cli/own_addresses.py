"""Where others can dial a server that listens here. What it listens on alone does not say."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from shoal.base.errors import ConfigError
from shoal.cli.machine import own_address
from shoal.net.address import Address, parse_listen
from shoal.server.announcing import public_address

HOSTS_MAX: Final = 4
"""Who dials begins with one more each second until one answers. Machines with containers have
dozens of addresses that lead nowhere from outside."""


def own_addresses(listening: Address, listen: str, announce: str | None) -> tuple[Address, ...]:
    """What a server says of itself: as told, or where it listens, the likeliest one first.

    A wildcard (`listen` with 0.0.0.0 or [::]) stands for this machine's own addresses; `listening`
    has the one that leads to others.

    Raises:
        ConfigError: malformed, or nobody else could reach it.
    """
    if announce is not None:
        return (public_address(listening, announce),)
    asked = parse_listen(listen).host
    try:
        wildcard = ipaddress.ip_address(asked)
    except ValueError:
        return (listening,)
    if not wildcard.is_unspecified:
        return (listening,)
    hosts = dialled_hosts(_hosts_here(), listening.host, has_v6=wildcard.version == 6)
    if not hosts:
        raise ConfigError(
            f"--listen {listen}: this machine is in no network, so nobody else could dial it; "
            "connect it, say --listen tcp://127.0.0.1:PORT, or tell what to announce: "
            "--announce tcp://HOST:PORT"
        )
    return tuple(replace(listening, host=host) for host in hosts)


def own_host() -> str | None:
    """The IPv4 address at which others can likely dial this machine; None: it is in no network.

    A network need not lead anywhere: boards on a switch of their own have no default route.
    """
    return own_address() or next(iter(dialled_hosts(_hosts_here(), "", has_v6=False)), None)


def dialled_hosts(hosts: Iterable[str], first: str, *, has_v6: bool) -> tuple[str, ...]:
    """Those of a machine's `hosts` that others can dial; `first` before the rest, if it is one."""
    found = []
    for host in hosts:
        address = ipaddress.ip_address(host)
        if address.is_loopback or address.is_link_local or address.is_unspecified:
            continue  # link-local ones need the name of an interface, which differs elsewhere
        if address.version == 4 or has_v6:
            found.append(host)
    found = list(dict.fromkeys(found))
    return tuple(sorted(found, key=lambda host: host != first)[:HOSTS_MAX])


def _hosts_here() -> list[str]:
    import ifaddr

    return [
        ip.ip if isinstance(ip.ip, str) else ip.ip[0]
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
    ]
