"""The frozen picture of a swarm that decisions are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.coordinates import Coordinate

ServerState = Literal["joining", "online", "draining"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """A server's word that it wants to host other blocks (`shoal.plan.rebalance`)."""

    ticket: int
    """Of two servers that want to leave the same blocks, the higher one waits."""
    span: Span
    """Where it wants to go."""
    is_going: bool = False
    """It has decided: nobody may count on it for the blocks that it hosts now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """One server as its record describes it."""

    peer: PeerId
    addresses: tuple[str, ...]
    span: Span
    state: ServerState = "online"
    numerics: str = ""
    is_exact: bool = False
    encodings: tuple[str, ...] = ()
    cache_tokens: int = 0
    decode_s_per_block: float = 0.0
    """Measured time of one decode row through one block, at batch 1."""
    prefill_s_per_block_token: float = 0.0
    decode_s_by_batch: tuple[tuple[int, float], ...] = ()
    """(batch, seconds of a decode pass of so many rows through one block), batches rising."""
    version: str = ""
    adapters: tuple[tuple[str, bytes], ...] = ()
    """(label, name) of the LoRA adapters that it serves to everybody."""
    intent: Intent | None = None
    """None: it stays where it is."""
    coordinate: Coordinate | None = None
    """Where it says it is in the space of round trips."""
    sent_bytes_per_s: float = 0.0
    """The rate at which others take its bytes, as it says; 0: not known."""
    record: bytes = b""
    """The signed record itself, to hand on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmView:
    """All servers of one model that are known now."""

    model: str
    num_blocks: int
    hidden_size: int
    servers: tuple[ServerView, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One hop of a chain that a decision chose: `peer` runs `span`."""

    peer: PeerId
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """A hop beside a chain: `stage` is fed, `lag_rows` at a time, and sends nothing on."""

    stage: Stage
    lag_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """What a client has learned by itself, which records can't tell."""

    rtt_s: dict[PeerId, float] = field(default_factory=dict)
    avoid: frozenset[PeerId] = frozenset()
    """Peers not to use now (failed, busy); used again only when nobody else is left."""
    strikes: dict[PeerId, int] = field(default_factory=dict)
    """How often peers failed during the decision that is due: when nobody else is left,
    those that failed least often go first, or the same dead ones would be tried for ever."""
    sessions: Mapping[PeerId, int] = field(default_factory=dict)
    """How many of the client's own sessions run at a server: they share its passes."""
    unreachable_pairs: frozenset[tuple[PeerId, PeerId]] = frozenset()
    """(sender, receiver) pairs whose direct link failed: link them via the client."""
    waits_s: dict[PeerId, float] = field(default_factory=dict)
    """In how many seconds a new session should find room at a server, as it says."""
    coordinate: Coordinate | None = None
    """Where the client is in the space of round trips."""
    hope_s: float | None = None
    """Round trip to hope for where none was measured; None: estimate it."""
    slowness: dict[PeerId, float] = field(default_factory=dict)
    """How many times longer than its record says a server takes for a decode row now."""
