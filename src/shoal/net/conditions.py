"""What may happen to frames and dials in memory: the hook for simulated networks.

The transport in `memory.py` asks and obeys; the lab decides (`shoal.lab.network`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from shoal.base.ids import PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameFate:
    """What becomes of one frame."""

    arrivals_s: tuple[float, ...] = (0.0,)
    """Delays after which copies of it arrive; none: it is lost. The first copy keeps its
    place in the stream; the others come as much later as their delays are longer."""
    corrupt_byte: int | None = None
    """Index (modulo the frame's size) of a byte to flip."""
    is_reset: bool = False
    """The stream breaks at both ends instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """The frame and all behind it wait until the conditions change.

    That is what a stream transport makes of an interrupted path: it sends again and
    again. After `break_after_s` (infinite: never) both ends notice and the stream breaks.
    """

    break_after_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DialFate:
    """What becomes of an attempt to dial: "allowed" and "refused" come after `delay_s`."""

    kind: Literal["allowed", "refused", "black_hole"] = "allowed"
    delay_s: float = 0.0


class Conditions(Protocol):
    """Decides what happens between peers. The lab's is `shoal.lab.network`."""

    def dial(self, dialer: PeerId, listener: PeerId) -> DialFate:
        """What becomes of a dial, asked when it begins."""

    def frame(self, sender: PeerId, receiver: PeerId, frame_bytes: int) -> FrameFate | Held:
        """What becomes of a frame, asked in sending order, and again after a change if held.

        Of the fate of a stream's end (0 bytes) only the first delay or Held counts.
        """

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever held frames may go on."""


class PerfectConditions:
    """No delay, no loss; everything still passes through the event loop."""

    _DIAL = DialFate()
    _FRAME = FrameFate()

    def dial(self, dialer: PeerId, listener: PeerId) -> DialFate:
        """Always allowed, at once."""
        return self._DIAL

    def frame(self, sender: PeerId, receiver: PeerId, frame_bytes: int) -> FrameFate | Held:
        """Arrives at once."""
        return self._FRAME

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Nothing ever changes."""
