"""How fast bytes leave this machine: what the system measured on connections that were busy.

Linux tells for each TCP connection how fast the other side has acknowledged bytes lately, and
whether there was always more to send (tcp(7), TCP_INFO; the fields are appended for ever, so
their places are fixed). Only bursts show what a link can do: weights, prompts, training. Of
single rows nothing is learned. Other systems don't tell: there nothing is known.
"""

from __future__ import annotations

import socket
import struct
from collections import OrderedDict
from dataclasses import dataclass
from statistics import median
from typing import Final, Protocol

HOSTS_MAX: Final = 64
"""Hosts that are remembered; those that were silent longest are forgotten."""

BURST_BYTES: Final = 1 << 20
"""A connection that carried less since the last look is hardly out of TCP's slow start."""

FADE: Final = 0.5
"""By so much the known rate follows one that is lower: lines change, and slow starts look slow."""

_TCP_INFO: Final = getattr(socket, "TCP_INFO", 11)
_INFO_BYTES: Final = 168
_BITS_AT, _APP_LIMITED = 7, 1
_ACKNOWLEDGED_AT: Final = 120
_DELIVERY_RATE_AT: Final = 160


class Socket(Protocol):
    """What is asked of a socket."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """The bytes of an option."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a connection was seen to carry."""

    bytes_per_s: int
    acknowledged_bytes: int
    """Since it began."""
    is_full: bool
    """There was always more to send: the rate is the link's, not the application's."""


def parse_tcp_info(data: bytes) -> Delivery | None:
    """What `struct tcp_info` says; None: an older system, which tells less."""
    if len(data) < _INFO_BYTES:
        return None
    (acknowledged,) = struct.unpack_from("=Q", data, _ACKNOWLEDGED_AT)
    (rate,) = struct.unpack_from("=Q", data, _DELIVERY_RATE_AT)
    return Delivery(rate, acknowledged, not data[_BITS_AT] & _APP_LIMITED)


def delivery_of(sock: Socket) -> Delivery | None:
    """What the system knows of a connection; None: nothing."""
    try:
        return parse_tcp_info(sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_BYTES))
    except (OSError, ValueError):  # closed, or a system without it
        return None


class SentRates:
    """The rates at which bytes went to hosts, in bounded memory."""

    def __init__(self, hosts_max: int = HOSTS_MAX) -> None:
        self._rates: OrderedDict[str, float] = OrderedDict()
        self._hosts_max = hosts_max

    def saw(self, host: str, bytes_per_s: float) -> None:
        """Take in what a busy connection to `host` carried."""
        known = self._rates.pop(host, 0.0)
        self._rates[host] = max(bytes_per_s, known + FADE * (bytes_per_s - known))
        if len(self._rates) > self._hosts_max:
            self._rates.popitem(last=False)

    @property
    def typical_bytes_per_s(self) -> float | None:
        """The median over hosts: one neighbour on the same network, or one slow receiver, says
        little of our own line. None: nothing was sent that could tell."""
        return median(self._rates.values()) if self._rates else None
