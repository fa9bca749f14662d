"""Where the rows of samples that go round a ring leave, a slot at a time.

Without it rows that once met in a server's queue stay together for good: all samples drift into
one group, and the stages of the ring idle in turn. `plan.slots` decides; here is who waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from shoal.plan.slots import Gate, Slots, departing


class _Slot:
    """One group that left together, until the first of it is back."""

    def __init__(self, left_s: float) -> None:
        self.left_s = left_s


class Turnstile:
    """Lets samples pass in slots. One event loop; samples are known by any hashable."""

    def __init__(self, choose: Callable[[int], Slots]) -> None:
        """`choose` says how so many samples go round; asked again whenever their number changes."""
        self._choose = choose
        self._slots = Slots(count=1)
        self._members: dict[int, _Slot | None] = {}
        """Samples that decode, and the slot each is under way in."""
        self._away: set[_Slot] = set()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None

    @property
    def slots(self) -> Slots:
        """How samples go round now."""
        return self._slots

    @property
    def samples(self) -> int:
        """Samples that decode."""
        return len(self._members)

    def choose_again(self) -> None:
        """The times changed."""
        if self._members:
            self._slots = self._choose(len(self._members))
            self._look_soon()

    async def enter(self, sample: int) -> None:
        """Wait for the sample's turn; it is back when it enters again or leaves."""
        if sample not in self._members:
            self._members[sample] = None
            self.choose_again()
        self._back(sample)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((sample, turn))
        self._look_soon()
        await turn

    def leave(self, sample: int) -> None:
        """The sample is over. Idempotent."""
        if sample not in self._members:
            return
        self._back(sample)
        del self._members[sample]
        self._waiting = deque(one for one in self._waiting if one[0] != sample)
        self.choose_again()

    def close(self) -> None:
        """Nobody passes any more; whoever waits is to be cancelled by its owner."""
        if self._timer is not None:
            self._timer.cancel()

    def _back(self, sample: int) -> None:
        slot, self._members[sample] = self._members[sample], None
        if slot is not None:
            self._away.discard(slot)

    def _look_soon(self) -> None:
        # After all that woke up in this turn of the loop: who came in one frame leaves in one.
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        gate = Gate(
            waiting=len(self._waiting),
            samples=len(self._members),
            away_s=tuple(now_s - slot.left_s for slot in self._away),
        )
        departure = departing(self._slots, gate)
        if departure.rows:
            slot = _Slot(now_s)
            self._away.add(slot)
            for _ in range(departure.rows):
                sample, turn = self._waiting.popleft()
                self._members[sample] = slot
                if not turn.done():
                    turn.set_result(None)
            self._look_soon()
        elif departure.again_s is not None:
            self._timer = loop.call_later(departure.again_s, self._look)
