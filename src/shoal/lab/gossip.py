"""A thousand gossiping peers on virtual time: the very rules, over simulated streams.

Only what `discovery.gossiper` decides runs here, and what it is told: streams that open,
carry, fall silent and break, after delays. Handshakes cost time, not work, and each
signature is checked once for all peers: so minutes of a large swarm take seconds.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shoal.base.errors import ShoalError
from shoal.base.ids import PeerId, peer_text
from shoal.base.limits import RECORD_TTL_S
from shoal.discovery.coordinates import to_wire
from shoal.discovery.directory import SignedRecord
from shoal.discovery.gossiper import TICK_S, Gossiper
from shoal.discovery.neighbourhood import Action, Dial, Drop, Send
from shoal.discovery.records import Record, open_record, sign_record
from shoal.discovery.store import RecordStore
from shoal.net.identity import Identity
from shoal.wire.gossip import Part
from shoal.wire.messages import Message, encode

SWARM: Final = "lab"

FRAMING_BYTES: Final = 8 + 22 + 52 + 26
"""What a message costs beside its own bytes: frame prefix, TLS record, TCP and IP headers,
and half an acknowledgement."""

RENEW_S: Final = 0.8 * RECORD_TTL_S
"""A server signs a new record this often, as `server.announcing` does."""

DELAY_S: Final = (0.01, 0.08)
"""One-way delays between two peers."""


@dataclass(slots=True)
class _Stream:
    """One open stream; a direction's frames keep their order."""

    ends: tuple[PeerId, PeerId]
    """Who dialled, and whom."""
    delay_s: float
    is_open: bool = True
    busy_s: dict[PeerId, float] = field(default_factory=dict)


@dataclass(slots=True)
class GossipPeer:
    """One simulated server: its rules, its records, its streams."""

    peer: PeerId
    identity: Identity
    store: RecordStore
    gossiper: Gossiper
    streams: dict[PeerId, _Stream] = field(default_factory=dict)
    is_up: bool = True
    is_leaving: bool = False
    counter: int = 0
    boot: int = 1
    sent_bytes: int = 0
    received_bytes: int = 0

    def knows(self) -> frozenset[PeerId]:
        """The servers that it holds to be here, suspects left out."""
        snapshot = self.store.snapshot()
        return frozenset(PeerId(one.record.peer) for one in snapshot.records) - snapshot.suspects


class GossipSwarm:
    """Many peers, one clock, one random generator.

    `delay_s` tells the one-way delay between two peers; None: any of `DELAY_S`.
    """

    def __init__(
        self, rng: random.Random, delay_s: Callable[[PeerId, PeerId], float] | None = None
    ) -> None:
        self._delay_s = delay_s or (lambda one, other: rng.uniform(*DELAY_S))
        self.now_s = 0.0
        self.peers: dict[PeerId, GossipPeer] = {}
        self._rng = rng
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._opened: dict[bytes, Record] = {}
        self._sides: dict[PeerId, int] = {}
        self._gone_silently: set[PeerId] = set()

    # --- what a scenario does ------------------------------------------------------------

    def grow(self, count: int) -> None:
        """So many peers that know each other, with records of every age."""
        fresh = [self._add(self._rng.randbytes(32)) for _ in range(count)]
        records = [(self._sign(one), self._rng.uniform(0.0, RENEW_S)) for one in fresh]
        for one in fresh:
            for (data, age_s), other in zip(records, fresh, strict=True):
                one.store.accept(data, self.now_s, age_s)
                if other is one:
                    self._at(self.now_s + RENEW_S - age_s, self._renew, one, one.boot)
        for one in fresh:
            self._start_ticks(one)

    def join(self) -> GossipPeer:
        """One more peer, which asks a peer that lives for all it knows."""
        via = self._rng.choice(self.living())
        one = self._add(self._rng.randbytes(32))
        for peer, data in list(via.store.envelopes()):
            one.store.accept(data, self.now_s, via.store.age_s(peer, self.now_s))
            via.sent_bytes += len(data)
            one.received_bytes += len(data)
        self._start_ticks(one)
        self._renew(one, one.boot)
        return one

    def crash(self, one: GossipPeer, *, is_silent: bool = True) -> None:
        """End a peer without a farewell; a silent one's streams don't even break."""
        one.is_up = False
        if is_silent:
            self._gone_silently.add(one.peer)
            return
        for stream in list(one.streams.values()):
            self._break(stream)

    def leave(self, one: GossipPeer) -> None:
        """End a peer politely: a tombstone, then Part."""
        self._publish(one, self._sign(one, state="offline", addresses=[]))
        self._do(one, one.gossiper.farewell())
        one.is_leaving = True
        self._at(self.now_s + 2 * DELAY_S[1], self._end, one)

    def split(self, *sides: Sequence[GossipPeer]) -> None:
        """Peers reach only those of their own side, until `heal`."""
        for number, side in enumerate(sides):
            self._sides.update({one.peer: number for one in side})

    def heal(self) -> None:
        """Everybody reaches everybody."""
        self._sides.clear()

    def living(self) -> list[GossipPeer]:
        """Those that are up."""
        return [one for one in self.peers.values() if one.is_up and not one.is_leaving]

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> float:
        """Let time pass; how much did, if `until` (asked every 0.25 s) held before the end."""
        start_s, end_s = self.now_s, self.now_s + seconds
        next_look_s = start_s
        while self._events and self._events[0][0] <= end_s:
            if until is not None and self._events[0][0] >= next_look_s:
                if until():
                    return self.now_s - start_s
                next_look_s = self._events[0][0] + 0.25
            self.now_s, _, event, arguments = heapq.heappop(self._events)
            event(*arguments)
        self.now_s = end_s
        return seconds

    # --- peers ---------------------------------------------------------------------------

    def _add(self, seed: bytes) -> GossipPeer:
        identity = Identity.from_seed(seed)
        peer = identity.peer
        store = RecordStore(SWARM, opener=self._open)
        rng = random.Random(self._rng.random())
        one = GossipPeer(peer, identity, store, Gossiper(peer, store, rng))
        self.peers[peer] = one
        return one

    def _open(self, data: bytes) -> Record:
        record = self._opened.get(data)
        if record is None:
            record = self._opened[data] = open_record(data)
        return record

    def _sign(self, one: GossipPeer, **fields: Any) -> bytes:
        one.counter += 1
        usual: dict[str, Any] = {
            "peer": one.peer,
            "swarm": SWARM,
            "boot_ms": 1_700_000_000_000 + one.boot,
            "counter": one.counter,
            "ttl_s": RECORD_TTL_S,
            "state": "online",
            "addresses": [f"tcp://{peer_text(one.peer)}@192.0.2.17:41234"],
            "model": "m" * 64,
            "num_blocks": 30,
            "hidden_size": 4096,
            "start": 0,
            "end": 10,
            "numerics": "bfloat16-int8-avx512-0123456789abcdef",
            "encodings": ["bfloat16", "float32", "float16", "int8-block"],
            "cache_tokens": 65_536,
            "decode_s_per_block": 0.00123,
            "prefill_s_per_block_token": 0.000123,
            "version": "0.1.0",
            "coordinate": to_wire(one.gossiper.coordinate),
        }
        return sign_record(one.identity, Record(**usual | fields))

    def _renew(self, one: GossipPeer, boot: int) -> None:
        if one.is_up and one.boot == boot:
            self._publish(one, self._sign(one))
            self._at(self.now_s + RENEW_S, self._renew, one, boot)

    def _publish(self, one: GossipPeer, data: bytes) -> None:
        one.store.accept(data, self.now_s)
        signed = SignedRecord(record=self._open(data), data=data)
        _, actions = one.gossiper.publish(signed, 0, self.now_s)
        self._do(one, actions)

    def _start_ticks(self, one: GossipPeer) -> None:
        self._at(self.now_s + self._rng.uniform(0.0, TICK_S), self._tick, one)

    @staticmethod
    def _end(one: GossipPeer) -> None:
        one.is_up = False

    def _tick(self, one: GossipPeer) -> None:
        if one.is_up and not one.is_leaving:
            self._do(one, one.gossiper.tick(self.now_s))
            self._at(self.now_s + TICK_S, self._tick, one)

    def _do(self, one: GossipPeer, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    stream = one.streams.get(action.peer)
                    if stream is not None:
                        self._send(one, action.peer, stream, action.message)
                case Dial():
                    self._dial(one, action)
                case Drop():
                    self._drop(one, action)

    # --- streams -------------------------------------------------------------------------

    def _send(self, one: GossipPeer, to: PeerId, stream: _Stream, message: Message) -> None:
        size = len(encode(message)) + FRAMING_BYTES
        one.sent_bytes += size
        arrival_s = max(stream.busy_s.get(to, 0.0), self.now_s + stream.delay_s)
        stream.busy_s[to] = arrival_s
        self._at(arrival_s, self._arrive, one.peer, to, stream, message, size)

    def _arrive(
        self, sender: PeerId, to: PeerId, stream: _Stream, message: Message, size: int
    ) -> None:
        receiver = self.peers[to]
        if not self._reaches(sender, to) or receiver.streams.get(sender) is not stream:
            return
        receiver.received_bytes += size
        try:
            actions = receiver.gossiper.receive(sender, message, self.now_s)
        except ShoalError:
            self._do(receiver, receiver.gossiper.shun(sender, self.now_s))
            self._break(stream)
            return
        self._do(receiver, actions)
        if receiver.gossiper.accused:
            receiver.gossiper.accused = False
            self._publish(receiver, self._sign(receiver))

    def _dial(self, one: GossipPeer, action: Dial) -> None:
        delay_s = self._delay_s(one.peer, action.peer)
        to = self.peers.get(action.peer)
        if to is None or not self._reaches(one.peer, action.peer):
            is_refused = to is not None and not to.is_up and to.peer not in self._gone_silently
            wait_s = 2 * delay_s if is_refused else action.timeout_s
            self._at(self.now_s + wait_s, self._fail, one, action.peer)
            return
        self._at(self.now_s + 8 * delay_s, self._open_stream, one, to, delay_s)

    def _fail(self, one: GossipPeer, peer: PeerId) -> None:
        if one.is_up:
            self._do(one, one.gossiper.undialled(peer, self.now_s))

    def _open_stream(self, one: GossipPeer, to: GossipPeer, delay_s: float) -> None:
        if not one.is_up:
            return
        if not self._reaches(one.peer, to.peer) or to.is_leaving:
            self._fail(one, to.peer)
            return
        if to.gossiper.admits(one.peer, self.now_s):
            self._do(one, one.gossiper.turned_away(to.peer, self.now_s))
            return
        if not (
            one.gossiper.prefers_new(to.peer, is_dialled=True)
            and to.gossiper.prefers_new(one.peer, is_dialled=False)
        ):
            one.gossiper.kept(to.peer)
            return
        stream = _Stream((one.peer, to.peer), delay_s)
        one.streams[to.peer] = to.streams[one.peer] = stream
        self._do(to, to.gossiper.joined(one.peer, self.now_s, is_dialled=False))
        self._do(one, one.gossiper.joined(to.peer, self.now_s, is_dialled=True))

    def _drop(self, one: GossipPeer, action: Drop) -> None:
        stream = one.streams.pop(action.peer, None)
        if stream is None:
            return
        if action.is_polite:
            self._send(one, action.peer, stream, Part())
        else:
            self._at(self.now_s + stream.delay_s, self._lose, action.peer, one.peer, stream)

    def _break(self, stream: _Stream) -> None:
        for end, other in (stream.ends, stream.ends[::-1]):
            self._at(self.now_s + stream.delay_s, self._lose, end, other, stream)

    def _lose(self, end: PeerId, other: PeerId, stream: _Stream) -> None:
        one = self.peers[end]
        if one.is_up and one.streams.get(other) is stream and self._may_hear_end(end, other):
            del one.streams[other]
            self._do(one, one.gossiper.left(other, self.now_s))

    def _may_hear_end(self, end: PeerId, other: PeerId) -> bool:
        return self._sides.get(end) == self._sides.get(other)

    def _reaches(self, sender: PeerId, to: PeerId) -> bool:
        are_up = self.peers[sender].is_up and self.peers[to].is_up
        return are_up and self._sides.get(sender) == self._sides.get(to)

    def _at(self, when_s: float, event: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), event, arguments))


def bytes_per_s(swarm: GossipSwarm, seconds: float) -> dict[str, float]:
    """Mean and highest traffic of a peer while `seconds` pass: sent, and both ways."""
    before = {one.peer: (one.sent_bytes, one.received_bytes) for one in swarm.living()}
    swarm.run(seconds)
    sent, both = [], []
    for one in swarm.living():
        was_sent, was_received = before.get(one.peer, (0, 0))
        sent.append((one.sent_bytes - was_sent) / seconds)
        both.append(sent[-1] + (one.received_bytes - was_received) / seconds)
    return {
        "sent_mean": sum(sent) / len(sent),
        "sent_max": max(sent),
        "both_mean": sum(both) / len(both),
        "both_max": max(both),
    }
