"""The rules of gossip, without I/O: whom to keep in touch with, and whom to suspect.

A Gossiper is told what happened and when, and answers with actions. `gossip.py` carries
them out over streams; the lab over virtual ones, a thousand peers at a time.

Deaths are noticed by neighbours, since something travels over every stream each second:
one that falls silent or breaks is dialled once more, and if that fails all are told. The
suspect refutes by a new record. Who spreads records is `spreading.py`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Final

from shoal.base.errors import ProtocolError
from shoal.base.ids import PeerId, short
from shoal.base.limits import DIAL_TIMEOUT_S, GOSSIP_BEAT_S
from shoal.discovery.directory import SignedRecord
from shoal.discovery.neighbourhood import (
    Action,
    Dial,
    Drop,
    Neighbour,
    Neighbourhood,
    name_of,
    new_neighbour,
)
from shoal.discovery.neighbours import (
    NeighbourView,
    Surroundings,
    admits,
    choose_dials,
    choose_surplus,
    num_wanted,
    prefers_new,
)
from shoal.discovery.positioning import Positioning
from shoal.discovery.spreading import Spreading
from shoal.discovery.store import RecordStore
from shoal.plan.coordinates import Coordinate
from shoal.wire.directory import Records
from shoal.wire.gossip import Beat, Digest, Offer, Part, RecordName, Suspects, Taken, WantRecords
from shoal.wire.messages import Message

logger = logging.getLogger(__name__)

TICK_S: Final = 0.5
"""How often `tick` wants to be called; half of GOSSIP_BEAT_S."""

SILENCE_S: Final = 4.0
"""A neighbour that says nothing for four beats is dialled anew."""

PAUSE_S: Final = 2.5
"""Ticks further apart mean that this process stood still (a laptop closed, a debugger), and
that the silence was its own."""

PROBE_TIMEOUT_S: Final = 3.0
"""How long a neighbour that fell silent has to answer: with SILENCE_S and SUSPECT_S a dead
machine is forgotten everywhere in less than 15 s."""

DOUBT_AFTER_S: Final = 150.0
"""A server that can't be dialled, and whose last record is older, is suspected though it was
no neighbour. One that is only unreachable from here refutes by a fresh record, so it is
asked to at most this often, whoever tries."""

REDIAL_S: Final = 30.0
"""A server that did not answer is not chosen as neighbour again for this long."""

RECONNECT_S: Final = 20.0
"""One of the lost servers, or of the joins, is dialled this often: so the halves of a split
swarm meet again."""

ALONE_RECONNECT_S: Final = 5.0
"""The same for a peer without neighbours."""

SUSPECTS_GAP_S: Final = 0.5
"""Suspicions for one neighbour are gathered this long after others: when a network splits,
hundreds come at once."""

ROTATE_S: Final = 120.0
"""One neighbour is exchanged this often, so that the graph stays random whatever was lost."""

JOINS_MAX: Final = 64
"""Joins that are kept, those found in the local network too: strangers may claim many."""

SHUN_S: Final = 600.0
"""A peer that handed over bad records is no neighbour for this long."""


class Gossiper:
    """One peer's part in the gossip of one swarm.

    Args:
        me: our own peer id.
        store: the records; what it takes from elsewhere is spread too.
        rng: chooses neighbours and times.
        joins: addresses, as text, of peers that may be dialled without a record.
        is_reader: a client: it dials two, is dialled by nobody, accuses nobody aloud.
    """

    def __init__(
        self,
        me: PeerId,
        store: RecordStore,
        rng: random.Random,
        *,
        joins: Mapping[PeerId, tuple[str, ...]] | None = None,
        is_reader: bool = False,
    ) -> None:
        self.around = Neighbourhood()
        self.accused = False
        """Somebody says that we have gone; a new record of ours refutes it."""
        self._me = me
        self._store = store
        self._rng = rng
        self._joins = {peer: texts for peer, texts in (joins or {}).items() if peer != me}
        self._is_reader = is_reader
        self._spreading = Spreading(self.around, store, rng)
        self._positioning = Positioning(self.around, store, rng)
        self._dialling: set[PeerId] = set()
        self._probing: set[PeerId] = set()
        self._failed_s: dict[PeerId, float] = {}
        self._shunned_s: dict[PeerId, float] = {}
        self._warned: dict[PeerId, tuple[int, int]] = {}
        """Neighbours that we told of an accusation, and of which sequence."""
        self._ticked_s: float | None = None
        self._next_rotation_s = 0.0
        self._next_reconnect_s = 0.0
        store.on_news(self._on_news)

    @property
    def neighbours(self) -> Mapping[PeerId, Neighbour]:
        """The open streams, by peer."""
        return self.around.neighbours

    @property
    def coordinate(self) -> Coordinate | None:
        """Where we are in the space of round trips; None: nothing was measured yet."""
        return self._positioning.coordinate

    @property
    def is_dialling(self) -> bool:
        """Whether a Dial is under way."""
        return bool(self._dialling)

    # --- streams ----------------------------------------------------------------------

    def admits(self, peer: PeerId, now_s: float) -> str:
        """Why a peer that dialled us must stay out; empty if it may come in."""
        if self._shunned_s.get(peer, now_s) > now_s:
            return "you handed over bad records; come back later"
        if peer not in self.neighbours and not admits(self._surroundings(), self._is_member(peer)):
            return "enough neighbours; ask another server"
        return ""

    def prefers_new(self, peer: PeerId, *, is_dialled: bool) -> bool:
        """Whether a new stream to a peer takes the place of the one that there is, if any."""
        old = self.neighbours.get(peer)
        return old is None or prefers_new(self._me, peer, old.is_dialled, is_dialled)

    def joined(self, peer: PeerId, now_s: float, *, is_dialled: bool) -> list[Action]:
        """A stream is open; it takes the place of an older one to that peer."""
        self._settle(peer)
        neighbour = new_neighbour(peer, now_s, is_dialled=is_dialled)
        self.around.neighbours[peer] = neighbour
        self._spreading.greet(neighbour, now_s)
        if not self._is_reader and (suspects := self._store.suspects()):
            self.around.send(peer, Suspects([name_of(one) for one in suspects]), now_s)
        self._trim(now_s)
        return self.around.take_actions()

    def kept(self, peer: PeerId) -> None:
        """A Dial succeeded, but the stream that there was already stays."""
        self._settle(peer)

    def undialled(self, peer: PeerId, now_s: float) -> list[Action]:
        """A Dial failed: a neighbour that had fallen silent is gone for all we know.

        So is a server whose record is not fresh: all its neighbours may have gone with it.
        """
        is_doubted = peer in self._probing or self._store.age_s(peer, now_s) > DOUBT_AFTER_S
        self._settle(peer)
        self._failed_s[peer] = now_s
        held = self._store.find(peer)
        if is_doubted and held is not None and peer not in self.neighbours:
            self._accuse(held, now_s)
        return self.around.take_actions()

    def turned_away(self, peer: PeerId, now_s: float) -> list[Action]:
        """A peer answered that it does not want us: it lives, and is left alone for a while."""
        self.around.neighbours.pop(peer, None)
        self._settle(peer)
        self._failed_s[peer] = now_s
        return self.around.take_actions()

    def left(self, peer: PeerId, now_s: float) -> list[Action]:
        """A stream broke."""
        if self.around.neighbours.pop(peer, None) is not None:
            self._probe(peer)
        return self.around.take_actions()

    def shun(self, peer: PeerId, now_s: float) -> list[Action]:
        """A neighbour misbehaved: its stream must close, and it must stay away."""
        self.around.neighbours.pop(peer, None)
        self._shunned_s[peer] = now_s + SHUN_S
        return self.around.take_actions()

    # --- messages ---------------------------------------------------------------------

    def receive(self, peer: PeerId, message: Message, now_s: float) -> list[Action]:
        """A neighbour said something.

        Raises:
            PeerMisbehaved, ProtocolError: it must not be a neighbour any more (`shun` it).
        """
        neighbour = self.neighbours.get(peer)
        if neighbour is None:
            return []
        neighbour.heard_s = now_s
        match message:
            case Beat():
                self._positioning.on_beat(neighbour, message, now_s)
            case Taken():
                pass
            case Offer():
                self._spreading.on_offer(neighbour, message, now_s)
            case WantRecords():
                self._spreading.on_wants(neighbour, message, now_s)
            case Records():
                self._spreading.on_records(neighbour, message, now_s)
                self._spreading.flush(now_s)
            case Digest():
                self._spreading.on_digest(neighbour, message, now_s)
            case Suspects():
                self._on_suspects(neighbour, message, now_s)
            case Part():
                del self.around.neighbours[peer]
                self.around.do(Drop(peer, "it parted", is_polite=False))
            case _:
                raise ProtocolError(f"{type(message).__name__} on a gossip stream")
        return self.around.take_actions()

    def publish(
        self, signed: SignedRecord, call: int, now_s: float
    ) -> tuple[list[PeerId], list[Action]]:
        """Hand our record, which the store has taken, to all neighbours; who will answer."""
        told = self._spreading.publish(signed, call, now_s)
        return told, self.around.take_actions()

    def meet(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Somebody who may be dialled without a record, like a join."""
        if peer != self._me and (peer in self._joins or len(self._joins) < JOINS_MAX):
            self._joins[peer] = addresses

    def seek(self, now_s: float) -> list[Action]:
        """Dial neighbours that are lacking now, not at the next tick."""
        self._dial_some(now_s)
        return self.around.take_actions()

    def farewell(self) -> list[Action]:
        """Part from all neighbours."""
        for peer in list(self.neighbours):
            self._part(peer, "leaving")
        return self.around.take_actions()

    # --- time -------------------------------------------------------------------------

    def tick(self, now_s: float) -> list[Action]:
        """What is due by now; call it every TICK_S."""
        self._notice_own_pause(now_s)
        self._store.expire(now_s)
        for peer, neighbour in list(self.neighbours.items()):
            if now_s - neighbour.heard_s > SILENCE_S:
                del self.around.neighbours[peer]
                self.around.do(Drop(peer, f"silent for {SILENCE_S:g} s", is_polite=False))
                self._probe(peer)
        self._spreading.tick(now_s)
        self._flush_suspicions(now_s)
        if not self._is_reader:
            self._positioning.tick(now_s)
        for peer, neighbour in self.neighbours.items():
            if now_s - neighbour.sent_s >= GOSSIP_BEAT_S:
                self.around.send(peer, Beat(), now_s)
        self._dial_some(now_s)
        return self.around.take_actions()

    def _notice_own_pause(self, now_s: float) -> None:
        if self._ticked_s is not None and now_s - self._ticked_s > PAUSE_S:
            for neighbour in self.neighbours.values():
                neighbour.heard_s = now_s
        self._ticked_s = now_s

    def _dial_some(self, now_s: float) -> None:
        num_dialled = sum(one.is_dialled for one in self.neighbours.values())
        if num_dialled + len(self._dialling) < num_wanted(self._is_reader):
            around = self._surroundings()
            for peer in choose_dials(around, self._candidates(now_s), self._rng):
                self._dial(peer, DIAL_TIMEOUT_S)
        elif now_s >= self._next_rotation_s and not self._is_reader:
            if self._next_rotation_s and (candidates := self._candidates(now_s)):
                self._dial(self._rng.choice(candidates), DIAL_TIMEOUT_S)
            self._next_rotation_s = now_s + ROTATE_S * self._rng.uniform(0.8, 1.2)
        if now_s >= self._next_reconnect_s:
            period_s = RECONNECT_S if self.neighbours else ALONE_RECONNECT_S
            if self._next_reconnect_s and (strays := self._strays(now_s)):
                self._dial(self._rng.choice(strays), DIAL_TIMEOUT_S)
            self._next_reconnect_s = now_s + period_s * self._rng.uniform(0.8, 1.2)

    def _candidates(self, now_s: float) -> list[PeerId]:
        """Servers that could be neighbours and are not."""
        self._forget_failures(now_s)
        records = [PeerId(one.record.peer) for one in self._store.snapshot().records]
        joins = [peer for peer in self._joins if self._store.find(peer) is None]
        return [
            peer
            for peer in (*records, *joins)
            if self._may_dial(peer) and not self._store.is_suspect(peer)
        ]

    def _forget_failures(self, now_s: float) -> None:
        redial_s = REDIAL_S if self.neighbours else ALONE_RECONNECT_S
        for known, limit_s in ((self._failed_s, now_s - redial_s), (self._shunned_s, now_s)):
            for peer in [peer for peer, since_s in known.items() if since_s <= limit_s]:
                del known[peer]

    def _strays(self, now_s: float) -> list[PeerId]:
        """Servers that vanished, and joins that we have no record of."""
        self._forget_failures(now_s)
        joins = {peer for peer in self._joins if self._store.find(peer) is None}
        return [p for p in sorted(joins.union(self._store.lost())) if self._may_dial(p)]

    def _may_dial(self, peer: PeerId) -> bool:
        return (
            peer != self._me
            and peer not in self.around.neighbours
            and peer not in self._dialling
            and peer not in self._failed_s
            and peer not in self._shunned_s
        )

    # --- suspicion --------------------------------------------------------------------

    def _probe(self, peer: PeerId) -> None:
        """A neighbour fell silent: see whether it can still be dialled."""
        if self._is_member(peer) and peer not in self._dialling:
            self._probing.add(peer)
            self._dial(peer, PROBE_TIMEOUT_S)

    def _accuse(self, held: SignedRecord, now_s: float) -> None:
        name = name_of(held)
        if self._store.suspect(PeerId(name.peer), held.record.sequence, now_s):
            logger.info("suspected peer=%s", short(name.peer))
            self.around.counts["accused"] += 1
            self._tell([name], now_s)

    def _on_suspects(self, neighbour: Neighbour, message: Suspects, now_s: float) -> None:
        passed_on: list[RecordName] = []
        better: list[RecordName] = []
        for name in message.names:
            if not neighbour.suspects.take(now_s):
                self.around.counts["flood"] += 1
                break
            peer, sequence = PeerId(name.peer), (name.boot_ms, name.counter)
            neighbour.suspicions.pop(peer, None)
            held = self._store.find(peer)
            if held is None or held.record.sequence < sequence:
                continue
            if held.record.sequence > sequence:
                better.append(name_of(held))
            elif peer == self._me:
                self.accused = True
            elif self._hears(peer, now_s):
                self._warn(peer, name, now_s)
            elif self._store.suspect(peer, sequence, now_s):
                passed_on.append(name)
        if passed_on:
            self._tell(passed_on, now_s, but=neighbour.peer)
        if better:
            self.around.send(neighbour.peer, Offer(better), now_s)

    def _hears(self, peer: PeerId, now_s: float) -> bool:
        """Whether a peer lives for all we know ourselves: an accusation stops here."""
        neighbour = self.neighbours.get(peer)
        return neighbour is not None and now_s - neighbour.heard_s <= 2 * GOSSIP_BEAT_S

    def _warn(self, peer: PeerId, name: RecordName, now_s: float) -> None:
        """Let a living neighbour know that it is accused, once for each of its records."""
        sequence = (name.boot_ms, name.counter)
        if self._warned.get(peer) != sequence:
            self._warned[peer] = sequence
            self.around.send(peer, Suspects([name]), now_s)

    def _tell(self, names: list[RecordName], now_s: float, but: PeerId | None = None) -> None:
        """Pass suspicions on; a reader keeps its own to itself."""
        if self._is_reader:
            return
        for neighbour in self.neighbours.values():
            if neighbour.peer != but:
                neighbour.suspicions.update((PeerId(name.peer), name) for name in names)
        self._flush_suspicions(now_s)

    def _flush_suspicions(self, now_s: float) -> None:
        for peer, neighbour in self.neighbours.items():
            if neighbour.suspicions and now_s - neighbour.warned_s >= SUSPECTS_GAP_S:
                neighbour.warned_s = now_s
                names, neighbour.suspicions = list(neighbour.suspicions.values()), {}
                self.around.send(peer, Suspects(names), now_s)

    # --- parts ------------------------------------------------------------------------

    def _on_news(self, signed: SignedRecord) -> None:
        peer = PeerId(signed.record.peer)
        self._failed_s.pop(peer, None)
        self._warned.pop(peer, None)
        if peer == self._me:
            self.accused = False

    def _dial(self, peer: PeerId, timeout_s: float) -> None:
        signed = self._store.find(peer) or self._store.find_lost(peer)
        addresses = () if signed is None else tuple(signed.record.addresses)
        self._dialling.add(peer)
        self.around.do(Dial(peer, addresses or self._joins.get(peer, ()), timeout_s))

    def _settle(self, peer: PeerId) -> None:
        self._dialling.discard(peer)
        self._probing.discard(peer)
        self._failed_s.pop(peer, None)

    def _trim(self, now_s: float) -> None:
        peer = choose_surplus(self._surroundings())
        if peer is not None:
            self._part(peer, "one neighbour too many")

    def _part(self, peer: PeerId, reason: str) -> None:
        del self.around.neighbours[peer]
        self.around.do(Drop(peer, reason, is_polite=True))

    def _is_member(self, peer: PeerId) -> bool:
        held = self._store.find(peer)
        return held is not None and held.record.state != "offline"

    def _surroundings(self) -> Surroundings:
        return Surroundings(
            is_reader=self._is_reader,
            num_dialling=len(self._dialling),
            neighbours=tuple(
                NeighbourView(
                    peer=peer,
                    is_dialled=one.is_dialled,
                    is_member=self._is_member(peer),
                    since_s=one.since_s,
                )
                for peer, one in self.neighbours.items()
            ),
        )
