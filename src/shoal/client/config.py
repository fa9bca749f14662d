"""How a client behaves."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.client.tending import TendConfig
from shoal.client.waiting import OnWaiting


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client behaves."""

    model: str
    """The model's hash, as the servers' records name it."""
    num_blocks: int
    hidden_size: int
    patience_s: float = 60.0
    """How long a session waits for a chain before it fails."""
    tending: TendConfig = field(default_factory=TendConfig)
    """Standbys, and moves before they are forced."""
    on_waiting: OnWaiting | None = None
    """Told what sessions wait for meanwhile."""
