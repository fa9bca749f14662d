"""The control streams of all clients of one server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shoal.base.ids import PeerId
from shoal.net.origin import Origin
from shoal.server.control import ControlLink
from shoal.wire.messages import Message


class Controls:
    """A client may have several: one that stays, and short ones for a look at our load.

    It is here while it has any, and news go to all of them: who only looks ignores them.
    """

    def __init__(self) -> None:
        self._links: dict[PeerId, list[ControlLink]] = {}

    def __contains__(self, peer: object) -> bool:
        return peer in self._links

    @contextmanager
    def holding(self, control: ControlLink) -> Iterator[None]:
        """It counts in the block."""
        links = self._links.setdefault(control.peer, [])
        links.append(control)
        try:
            yield
        finally:
            links.remove(control)
            if not links:
                del self._links[control.peer]

    def origin(self, peer: PeerId) -> Origin | None:
        """Where its latest stream came from; None: it has none."""
        return self._links[peer][-1].origin if peer in self._links else None

    def post(self, peer: PeerId, message: Message) -> None:
        """Tell a client, if it is here."""
        for control in self._links.get(peer, ()):
            control.post(message)

    def close(self, peer: PeerId) -> None:
        """End a client's streams."""
        for control in self._links.get(peer, ()):
            control.close()

    def close_all(self) -> None:
        """End all streams."""
        for peer in self._links:
            self.close(peer)
