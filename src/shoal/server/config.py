"""What a server is handed: its address book and its bounds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from shoal.base.ids import PeerId
from shoal.base.limits import IDLE_SESSION_S, ORPHAN_GRACE_S, WINDOW_BYTES
from shoal.net.address import Address
from shoal.net.channel import Channel
from shoal.server.adapters import AdapterLimits
from shoal.server.engine import EngineLimits
from shoal.server.quotas import Quotas
from shoal.server.training_limits import TrainingLimits
from shoal.wire.directory import GetRecords, Publish
from shoal.wire.messages import ControlMessage

StreamService = Callable[[Channel], Awaitable[None]]
"""Serves one stream of its purpose until it ends; may raise PeerError or ProtocolError."""


class AddressBook(Protocol):
    """What a server asks of its directory."""

    def learn(self, record: bytes) -> None:
        """Take a signed record over if it is valid and news.

        Raises:
            ShoalError: it is not valid.
        """

    def addresses(self, peer: PeerId) -> tuple[Address, ...]:
        """Where a peer with a valid record of this swarm can be dialled."""

    def answer(self, message: GetRecords | Publish) -> ControlMessage:
        """The answer to somebody else's question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Bounds and times of one server."""

    engine: EngineLimits = field(default_factory=EngineLimits)
    quotas: Quotas = field(default_factory=Quotas)
    adapters: AdapterLimits = field(default_factory=AdapterLimits)
    training: TrainingLimits = field(default_factory=TrainingLimits)
    window_bytes: int = WINDOW_BYTES
    orphan_grace_s: float = ORPHAN_GRACE_S
    idle_session_s: float = IDLE_SESSION_S
    services: Mapping[str, StreamService] = field(default_factory=dict)
    """Who serves streams of other purposes than the server's own, by purpose."""
