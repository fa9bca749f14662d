"""Where a peer connects from, as far as that tells one stranger from another.

Identities are free, addresses are not: who wants many of them must rent machines. In IPv6 a
household gets at least a network of 64 bits, so that counts as one.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, NewType

Origin = NewType("Origin", str)
"""An IPv4 address or an IPv6 network of 64 bits."""

OWN_NETWORKS: Final = tuple(
    ip_network(text)
    for text in (
        "127.0.0.0/8",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "169.254.0.0/16",
        "100.64.0.0/10",
        "::1/128",
        "fc00::/7",
        "fe80::/10",
    )
)
"""This machine, local networks, and those that carriers and overlays share out: no stranger
comes from there, or many of them behind one gateway of ours."""

IPV6_BITS: Final = 64


def origin_of(host: str) -> Origin | None:
    """What the peers of a host share; None: nothing that says anything.

    `host` is an address as sockets name it; one in a network of our own, or no address at all
    (an in-memory stream), has no origin.
    """
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address in network for network in OWN_NETWORKS):
        return None
    if isinstance(address, IPv4Address):
        return Origin(str(address))
    return Origin(str(IPv6Network((address, IPV6_BITS), strict=False)))
