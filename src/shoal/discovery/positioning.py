"""The part of a Gossiper that finds out where we are: round trips to neighbours, by Beats.

Sans-I/O, for one peer. Every neighbour is asked now and then; its answer says where it is.
Only servers ask: clients measure by the pings that they send anyway.
"""

from __future__ import annotations

import random
from typing import Final

from shoal.base.ids import PeerId
from shoal.base.limits import GOSSIP_BEAT_S
from shoal.discovery.coordinates import Locator, from_wire, to_wire
from shoal.discovery.neighbourhood import Neighbour, Neighbourhood
from shoal.discovery.store import RecordStore
from shoal.plan.coordinates import NOWHERE, Coordinate
from shoal.wire.gossip import Beat

ASK_PERIOD_S: Final = 15.0
"""Between two round trips to one neighbour: 20 bytes a second with all six."""

ASK_SOON_S: Final = 3.0
"""The same while the neighbour was measured fewer than three times."""

SOON_COUNT: Final = 3


class Positioning:
    """Asks neighbours, answers them, and keeps our coordinate."""

    def __init__(self, around: Neighbourhood, store: RecordStore, rng: random.Random) -> None:
        self._around = around
        self._store = store
        self._heard: dict[PeerId, Coordinate] = {}
        """What neighbours said of their places; fresher than their records."""
        self._locator = Locator(rng, self._where)
        self._asks = 0

    @property
    def coordinate(self) -> Coordinate | None:
        """Ours; None: nothing was measured yet."""
        found = self._locator.coordinate
        return None if found is NOWHERE else found

    def tick(self, now_s: float) -> None:
        """Ask whom it is time to ask."""
        for peer in [peer for peer in self._heard if peer not in self._around.neighbours]:
            del self._heard[peer]
        for peer, one in self._around.neighbours.items():
            period_s = ASK_SOON_S if one.num_trips < SOON_COUNT else ASK_PERIOD_S
            if now_s - one.asked_s >= period_s:
                self._asks += 1
                one.ask, one.asked_s = self._asks, now_s
                self._around.send(peer, Beat(ask=self._asks), now_s)

    def on_beat(self, neighbour: Neighbour, message: Beat, now_s: float) -> None:
        """Answer; take an answer to what we asked last. One a beat is answered."""
        if message.ask and now_s - neighbour.echoed_s >= GOSSIP_BEAT_S:
            neighbour.echoed_s = now_s
            echo = Beat(echo=message.ask, coordinate=to_wire(self.coordinate))
            self._around.send(neighbour.peer, echo, now_s)
        if message.echo and message.echo == neighbour.ask:
            neighbour.ask, neighbour.num_trips = 0, neighbour.num_trips + 1
            there = from_wire(message.coordinate)
            self._heard[neighbour.peer] = NOWHERE if there is None else there
            self._locator.measured(neighbour.peer, now_s - neighbour.asked_s)

    def _where(self, peer: PeerId) -> Coordinate | None:
        if peer in self._heard:
            return self._heard[peer]
        held = self._store.find(peer)
        return None if held is None else from_wire(held.record.coordinate)
