"""What all clients of one network address may take together. Pure.

Quotas are per identity, and identities are free. What is there for all strangers together
(memory for adapters and training, the cache, places) is therefore shared out by address as
well: however many identities somebody makes, the rest is left for others. Who is in a network
of our own, or has no address, is bounded as one client only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from shoal.base.errors import ConfigError
from shoal.net.origin import Origin

ADDRESS_SHARE: Final = 0.75
"""The same as one client's part of the cache: a quarter is left for everybody else."""


def check_share(share: float) -> None:
    """Raises:
    ConfigError: no share.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"address_share is {share:g}: above 0, at most 1")


def room_for(total: int, share: float, per_client: int) -> int:
    """What one address may take of `total`: its share, but never less than one client may."""
    return max(int(total * share), min(total, per_client))


def taken_by(origin: Origin | None, held: Iterable[tuple[Origin | None, int]]) -> int:
    """How much of what is held goes to this origin; nothing is counted where there is none."""
    if origin is None:
        return 0
    return sum(amount for one, amount in held if one == origin)


def left_for(
    origin: Origin | None,
    held: Iterable[tuple[Origin | None, int]],
    *,
    total: int,
    share: float,
    per_client: int,
) -> int:
    """How much more this origin may take; `total` where there is no origin."""
    if origin is None:
        return total
    return room_for(total, share, per_client) - taken_by(origin, held)
