"""Answers thin clients: they send tokens, and get the tokens that a chain and a head make.

Whoever serves this is itself a client of the chain: it owns the sessions, and a server's
failure is repaired below it. What it holds for a guest can always be lost: the guest has its
tokens and asks another one. All sessions of a stream end with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.base.errors import (
    BadInput,
    ConfigError,
    PeerBusy,
    ProtocolError,
)
from shoal.base.head import HeadBackend
from shoal.base.ids import PeerId, short
from shoal.client.chain_session import ChainSession
from shoal.client.head_guest import BUSY_RETRY_S, Guest
from shoal.client.waves import Waves
from shoal.net.channel import Channel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLimits:
    """What guests may take."""

    guests_max: int = 64
    """Streams at once."""
    streams_per_guest: int = 2
    """One in use, and one that broke and is not noticed yet."""
    sessions_max: int = 512
    """Over all guests. To the chain's servers they are those of one client, which may have
    `--client-sessions` there."""
    sessions_per_guest: int = 128
    """A gateway with 32 answers at work and 64 sessions at rest, and room."""
    tokens_per_guest: int = 1 << 20
    """Positions over all sessions of one guest: 40 MB of numbers here, and cache at servers."""
    answers_max: int = 256
    """At work at the same time, over all guests."""
    answers_per_guest: int = 64
    idle_s: float = 600.0
    """Sessions that nobody asked anything of for so long are freed."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")


class OpenSession(Protocol):
    """How sessions along the chain begin: see `shoal.client.client.Client.open_session`."""

    def __call__(
        self, encoding: str, *, inner_encoding: str | None = None, adapter: bytes = b""
    ) -> Awaitable[ChainSession]:
        """A session over all blocks, through the adapter of this name."""


class HeadService:
    """Serves head streams of a server."""

    def __init__(
        self,
        head: HeadBackend,
        open_session: OpenSession,
        limits: HeadLimits | None = None,
        compressed: str | None = None,
    ) -> None:
        """`compressed` is the encoding between servers of guests who allow compression."""
        self.head = head
        self.open_session = open_session
        self.limits = limits or HeadLimits()
        self.compressed = compressed
        self.waves = Waves()
        self._streams: Counter[PeerId] = Counter()
        self._guests: set[Guest] = set()
        self.is_leaving = False
        """Nothing new is taken: guests go elsewhere."""
        self.num_tokens = 0
        """Tokens given, ever."""

    def leave(self) -> None:
        """Take nothing new; what is at work goes on."""
        self.is_leaving = True

    async def drain(self, within_s: float) -> bool:
        """Take nothing new; returns whether all answers at work ended in time."""
        self.leave()
        held = [one for guest in self._guests for one in guest.sessions.values()]
        at_work = [one.task for one in held if one.task is not None and not one.task.done()]
        if not at_work:
            return True
        _, left = await asyncio.wait(at_work, timeout=within_s)
        return not left

    @property
    def num_sessions(self) -> int:
        """Sessions of all guests."""
        return sum(len(guest.sessions) for guest in self._guests)

    @property
    def num_answers(self) -> int:
        """Answers at work."""
        return sum(guest.num_answers for guest in self._guests)

    def check_tokens(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the model has not.

        Raises:
            BadInput: names one.
        """
        size = self.head.facts.vocab_size
        if ids and max(ids) >= size:
            raise BadInput(f"token {max(ids)} is outside the vocabulary of {size}")

    def tokens_of(self, peer: PeerId) -> int:
        """Positions of all sessions of a guest."""
        return sum(guest.num_positions for guest in self._guests if guest.peer == peer)

    def sessions_of(self, peer: PeerId) -> int:
        """Sessions of a guest."""
        return sum(len(guest.sessions) for guest in self._guests if guest.peer == peer)

    async def serve(self, channel: Channel) -> None:
        """Answer on one stream until it ends.

        Raises:
            PeerUnreachable, PeerTimeout: it ended, or the guest takes no answers.
            ProtocolError: nonsense came.
        """
        peer = channel.peer
        if self.is_leaving:
            await channel.refuse(PeerBusy("is leaving", retry_after_s=BUSY_RETRY_S))
            return
        if (
            self._streams.total() >= self.limits.guests_max
            or self._streams[peer] >= self.limits.streams_per_guest
        ):
            await channel.refuse(PeerBusy("has enough guests now", retry_after_s=BUSY_RETRY_S))
            return
        self._streams[peer] += 1
        logger.info("guest came peer=%s", short(peer))
        guest = Guest(self, channel)
        self._guests.add(guest)
        try:
            await guest.run()
        except ProtocolError as error:
            await channel.refuse(error)
            raise
        finally:
            self._guests.discard(guest)
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            channel.close()
