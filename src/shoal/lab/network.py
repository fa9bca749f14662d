"""A simulated network: delays, rates, losses and faults between named peers.

Give it to `MemoryNetwork`; change it while the simulation runs. All chance comes from
the generator that was handed in, so a run is repeated by its seed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.net.conditions import DialFate, FrameFate, Held

Pair = tuple[PeerId, PeerId]
"""From whom, to whom."""

BREAK_AFTER_S: Final = 15.0
"""Streams break when nothing gets through for this long: QUIC's and many TCP stacks'
user timeouts lie between 10 and 30 s."""

DIAL_ROUND_TRIPS: Final = 2
"""Round trips until a stream is up: one for TCP, one for TLS 1.3."""

FOREVER_S: Final = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConditions:
    """What one direction between two peers does to frames. Probabilities are per frame."""

    delay_s: float = 0.0
    """One way, without queueing."""
    rate_bytes_per_s: float = FOREVER_S
    """Frames of all streams of the pair queue for it in this direction."""
    jitter_s: float = 0.0
    """Added to the delay, uniformly between 0 and this. Never changes the order."""
    loss: float = 0.0
    """Probability that a packet is lost and sent again: the frame and all behind it come
    `resend_s` later (again with this probability)."""
    resend_s: float = 0.2
    drop: float = 0.0
    """Probability that the frame vanishes. Real stream transports don't do that; the
    session protocol survives it all the same."""
    duplicate: float = 0.0
    """Probability that a second copy comes up to `duplicate_after_s` after the first."""
    duplicate_after_s: float = 0.1
    corrupt: float = 0.0
    """Probability that one byte is flipped."""
    reset: float = 0.0
    """Probability that the stream breaks instead."""

    def __post_init__(self) -> None:
        for name in ("loss", "drop", "duplicate", "corrupt", "reset"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is a probability: {getattr(self, name)} is not in 0..1")
        if self.loss == 1.0:
            raise ConfigError("with loss 1 nothing ever arrives: use drop=1, or cut the link")
        if self.rate_bytes_per_s <= 0:
            raise ConfigError(f"rate_bytes_per_s must be positive, not {self.rate_bytes_per_s}")


@dataclass(slots=True)
class Traffic:
    """What one directed pair has carried."""

    frames: int = 0
    frame_bytes: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _Faults:
    """The faults in force now."""

    groups: list[frozenset[PeerId]] = field(default_factory=list)
    cuts: set[Pair] = field(default_factory=set)
    black_holes: set[Pair] = field(default_factory=set)
    undialable: set[Pair] = field(default_factory=set)
    frozen: set[PeerId] = field(default_factory=set)
    slow: dict[Pair, float] = field(default_factory=dict)


class SimulatedNetwork:
    """Conditions from a description, with faults that come and go.

    `links` holds directed pairs; a pair that is not there uses the opposite direction's
    conditions, or else `default`.
    """

    def __init__(
        self,
        rng: random.Random,
        *,
        default: LinkConditions | None = None,
        links: Mapping[Pair, LinkConditions] | None = None,
        break_after_s: float = BREAK_AFTER_S,
    ) -> None:
        self.traffic: dict[Pair, Traffic] = {}
        self._rng = rng
        self._default = default or LinkConditions()
        self._links = dict(links or {})
        self._break_after_s = break_after_s
        self._faults = _Faults()
        self._busy_until_s: dict[Pair, float] = {}
        self._subscribers: list[Callable[[], None]] = []

    # --- faults -------------------------------------------------------------------

    def partition(self, *groups: Iterable[PeerId]) -> None:
        """Only peers of the same group reach each other; peers of none form one more.

        Frames wait, and their streams break after `break_after_s`. Replaces an earlier
        partition.
        """
        self._faults.groups = [frozenset(group) for group in groups]
        self._changed()

    def cut(self, sender: PeerId, receiver: PeerId) -> None:
        """Frames of this direction wait, and their streams break after `break_after_s`."""
        self._faults.cuts.add((sender, receiver))

    def mend(self, sender: PeerId, receiver: PeerId) -> None:
        """End all faults of this one direction, partitions excepted."""
        pair = (sender, receiver)
        self._faults.cuts.discard(pair)
        self._faults.black_holes.discard(pair)
        self._faults.undialable.discard(pair)
        self._faults.slow.pop(pair, None)
        self._changed()

    def black_hole(self, sender: PeerId, receiver: PeerId) -> None:
        """Frames of this direction vanish, and nobody's stream ever breaks of it."""
        self._faults.black_holes.add((sender, receiver))

    def forbid_dialing(self, dialer: PeerId, listener: PeerId) -> None:
        """New dials of this direction are refused (a firewall); open streams live on."""
        self._faults.undialable.add((dialer, listener))

    def freeze(self, peer: PeerId) -> None:
        """Nothing leaves or reaches the peer, and no stream breaks: its process is stopped."""
        self._faults.frozen.add(peer)

    def thaw(self, peer: PeerId) -> None:
        """The peer goes on; what waited arrives."""
        self._faults.frozen.discard(peer)
        self._changed()

    def slow(self, sender: PeerId, receiver: PeerId, factor: float) -> None:
        """This direction's delay and transmission times are `factor` times as long."""
        if factor <= 0:
            raise ConfigError(f"a slow factor must be positive, not {factor}")
        self._faults.slow[sender, receiver] = factor

    def set_link(self, sender: PeerId, receiver: PeerId, conditions: LinkConditions) -> None:
        """Replace the conditions of one direction."""
        self._links[sender, receiver] = conditions

    def heal(self) -> None:
        """End every fault; what waited goes on."""
        self._faults = _Faults()
        self._changed()

    def isolate(self, peer: PeerId, others: Collection[PeerId]) -> None:
        """Cut both directions between `peer` and each of `others`."""
        for other in others:
            self.cut(peer, other)
            self.cut(other, peer)

    # --- Conditions ------------------------------------------------------------------

    def dial(self, dialer: PeerId, listener: PeerId) -> DialFate:
        """See Conditions.dial."""
        there, back = (dialer, listener), (listener, dialer)
        if self._is_interrupted(there) or self._is_interrupted(back):
            return DialFate(kind="black_hole")
        round_trip_s = sum(
            self.link(*pair).delay_s * self._slowness(pair) for pair in (there, back)
        )
        if there in self._faults.undialable:
            return DialFate(kind="refused", delay_s=round_trip_s)
        return DialFate(delay_s=DIAL_ROUND_TRIPS * round_trip_s)

    def frame(self, sender: PeerId, receiver: PeerId, frame_bytes: int) -> FrameFate | Held:
        """See Conditions.frame."""
        pair = (sender, receiver)
        if sender in self._faults.frozen or receiver in self._faults.frozen:
            return Held(break_after_s=FOREVER_S)
        if self._is_cut(pair):
            return Held(break_after_s=self._break_after_s)
        link = self.link(sender, receiver)
        traffic = self.traffic.setdefault(pair, Traffic())
        traffic.frames += 1
        traffic.frame_bytes += frame_bytes
        if self._happens(link.reset):
            return FrameFate(is_reset=True)
        delay_s = self._delay_s(pair, link, frame_bytes)
        if pair in self._faults.black_holes or self._happens(link.drop):
            traffic.dropped += 1
            return FrameFate(arrivals_s=())
        arrivals_s: tuple[float, ...] = (delay_s,)
        if self._happens(link.duplicate):
            arrivals_s += (delay_s + self._rng.uniform(0, link.duplicate_after_s),)
        corrupt_byte = self._rng.randrange(1 << 30) if self._happens(link.corrupt) else None
        return FrameFate(arrivals_s=arrivals_s, corrupt_byte=corrupt_byte)

    def subscribe(self, changed: Callable[[], None]) -> None:
        """See Conditions.subscribe."""
        self._subscribers.append(changed)

    def link(self, sender: PeerId, receiver: PeerId) -> LinkConditions:
        """The conditions of one direction, faults aside."""
        found = self._links.get((sender, receiver)) or self._links.get((receiver, sender))
        return found or self._default

    def _changed(self) -> None:
        for changed in self._subscribers:
            changed()

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._rng.random() < probability

    def _is_cut(self, pair: Pair) -> bool:
        if pair in self._faults.cuts:
            return True
        return any((pair[0] in group) != (pair[1] in group) for group in self._faults.groups)

    def _is_interrupted(self, pair: Pair) -> bool:
        is_frozen = not self._faults.frozen.isdisjoint(pair)
        return is_frozen or self._is_cut(pair) or pair in self._faults.black_holes

    def _slowness(self, pair: Pair) -> float:
        return self._faults.slow.get(pair, 1.0)

    def _delay_s(self, pair: Pair, link: LinkConditions, frame_bytes: int) -> float:
        """Waiting for the line, transmission, and the way."""
        now_s = asyncio.get_running_loop().time()
        slowness = self._slowness(pair)
        start_s = max(now_s, self._busy_until_s.get(pair, now_s))
        self._busy_until_s[pair] = start_s + frame_bytes / link.rate_bytes_per_s * slowness
        delay_s = self._busy_until_s[pair] - now_s + link.delay_s * slowness
        if link.jitter_s:
            delay_s += self._rng.uniform(0, link.jitter_s)
        while self._happens(link.loss):
            delay_s += link.resend_s
        return delay_s
