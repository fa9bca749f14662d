"""One gossiper whose neighbours are only names, and what it says."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypeVar

from shoal.base.ids import PeerId
from shoal.discovery.gossiper import (
    TICK_S,
    Gossiper,
)
from shoal.discovery.neighbourhood import (
    Action,
    Dial,
    Send,
    name_of,
)
from shoal.discovery.store import RecordStore
from shoal.wire.gossip import Beat, RecordName
from shoal.wire.messages import Message
from tests.unit.discovery_cases import SWARM, identity

ME, ANN, BOB, CAT, DAN, EVE = (identity(number) for number in range(1, 7))
T = TypeVar("T", bound=Message)


class Scene:
    """One Gossiper with neighbours that only listen."""

    def __init__(self, *neighbours: PeerId, is_reader: bool = False) -> None:
        self.store = RecordStore(SWARM)
        self.gossiper = Gossiper(ME.peer, self.store, random.Random(1), is_reader=is_reader)
        self.now_s = 1000.0
        for peer in neighbours:
            self.gossiper.joined(peer, self.now_s, is_dialled=False)

    def hear(self, peer: PeerId, message: Message) -> list[Action]:
        return self.gossiper.receive(peer, message, self.now_s)

    def wait(self, seconds: float, hears: Iterable[PeerId] = ()) -> list[Action]:
        """Ticks, with beats from those who live."""
        actions: list[Action] = []
        for _ in range(round(seconds / TICK_S)):
            self.now_s += TICK_S
            for peer in hears:
                actions += self.hear(peer, Beat())
            actions += self.gossiper.tick(self.now_s)
        return actions

    @property
    def counts(self) -> dict[str, int]:
        return dict(self.gossiper.around.counts)


def said(actions: list[Action], kind: type[T]) -> list[tuple[PeerId, T]]:
    return [
        (a.peer, a.message) for a in actions if isinstance(a, Send) and isinstance(a.message, kind)
    ]


def dials(actions: list[Action]) -> list[PeerId]:
    return [action.peer for action in actions if isinstance(action, Dial)]


def name(data: bytes) -> RecordName:
    store = RecordStore(SWARM)
    store.accept(data, 0.0)
    return name_of(next(iter(store.snapshot().records)))
