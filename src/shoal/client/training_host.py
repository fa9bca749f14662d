"""What training needs of a client, and the same without servers that were caught lying."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Protocol

from shoal.base.ids import PeerId
from shoal.client.config import ClientConfig
from shoal.client.experience import ExperienceBook
from shoal.net.channel import Channel
from shoal.plan.view import SwarmView


class TrainingHost(Protocol):
    """What training needs of a client."""

    @property
    def experience(self) -> ExperienceBook:
        """What it knows of servers."""

    @property
    def rng(self) -> random.Random:
        """Chance."""

    @property
    def config(self) -> ClientConfig:
        """The model, and how long to wait."""

    def view(self) -> SwarmView:
        """The servers that are known now."""

    async def dial(self, peer: PeerId, purpose: str) -> Channel:
        """A stream to a server. Raises ShoalError."""

    async def wait_for_news(self, timeout_s: float) -> None:
        """Until the directory changed or the time is over."""


class HonestHost:
    """A client that does not know servers which were caught. A `TrainingHost`."""

    def __init__(self, host: TrainingHost) -> None:
        self.caught: set[PeerId] = set()
        self.experience = host.experience
        self.rng = host.rng
        self.config = host.config
        self.dial = host.dial
        self.wait_for_news = host.wait_for_news
        self._host = host

    def view(self) -> SwarmView:
        """The servers but those."""
        view = self._host.view()
        if not self.caught:
            return view
        left = tuple(one for one in view.servers if one.peer not in self.caught)
        return replace(view, servers=left)
