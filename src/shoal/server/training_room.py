"""Memory that all training clients share: what is left of it for one of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shoal.base.errors import PeerBusy
from shoal.net.origin import Origin
from shoal.server.shares import room_for
from shoal.server.training_limits import BUSY_RETRY_S


class Guest(Protocol):
    """A client, as far as sharing goes."""

    @property
    def origin(self) -> Origin | None:
        """Where it connects from."""


_G = TypeVar("_G", bound=Guest)
_T = TypeVar("_T")


@dataclass(frozen=True)  # slots and Generic don't go together
class Pot(Generic[_G]):
    """One kind of memory, bounded for all clients together and for those of one address."""

    name: str
    per_client: int
    total: int
    held: Callable[[_G], int]
    """What one client has of it now."""

    def check(self, num_bytes: int, guest: _G, guests: Iterable[_G], share: float) -> None:
        """Refuse `num_bytes` more for `guest` where others leave no room for them.

        What is alone in the pot, or alone of its address, always fits.

        Raises:
            PeerBusy: there are others.
        """
        held = [(one.origin, self.held(one)) for one in guests]
        everybody = sum(amount for _, amount in held)
        if everybody and everybody + num_bytes > self.total:
            raise PeerBusy(
                f"{self.name} of {everybody} bytes are in memory here", retry_after_s=BUSY_RETRY_S
            )
        if guest.origin is None:
            return
        near = sum(amount for origin, amount in held if origin == guest.origin)
        if near and near + num_bytes > room_for(self.total, share, self.per_client):
            raise PeerBusy(
                f"{self.name} of {near} bytes are in memory here for clients of your address "
                "(see --address-share)",
                retry_after_s=BUSY_RETRY_S,
            )


def unique(things: Iterable[_T]) -> list[_T]:
    """Each of them once, told apart by identity."""
    return list({id(one): one for one in things}.values())
