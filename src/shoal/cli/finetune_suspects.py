"""In which steps of a run values of a server are that nobody checked, should it be caught lying."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shoal.base.ids import PeerId, short


class Suspects:
    """What servers gave unchecked, step by step."""

    def __init__(self, done: int) -> None:
        """`done` steps were made before: nobody remembers whose values are in them."""
        self._done = done
        self._counts: dict[PeerId, int] = {}
        self._steps: dict[PeerId, tuple[int, int]] = {}
        self._told: set[PeerId] = set()

    def stepped(
        self, step: int, unchecked: Mapping[PeerId, int], caught: Iterable[PeerId]
    ) -> list[str]:
        """After each step: parts taken unchecked so far, by server, and who was caught so far.
        Gives what is to be told of those who were caught just now."""
        for peer, count in unchecked.items():
            if count > self._counts.get(peer, 0):
                self._counts[peer] = count
                self._steps[peer] = (self._steps.get(peer, (step, step))[0], step)
        new = [peer for peer in caught if peer not in self._told]
        self._told.update(new)
        return [self._text(peer, step) for peer in new]

    def _text(self, peer: PeerId, step: int) -> str:
        text = f"peer {short(peer)} gave wrong values in step {step} and is not used any more"
        if peer not in self._steps:
            return f"{text}; all that it gave since step {self._done + 1} was checked"
        first, last = self._steps[peer]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        return f"{text}; what it gave unchecked is in {steps}: {self._way_back(first)}"

    def _way_back(self, first: int) -> str:
        if first == 1:
            return "to be rid of it begin anew"
        return f"to be rid of it go on from a step before {first} (--resume DIR --from-step N)"
