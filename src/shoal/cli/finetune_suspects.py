"""In which steps of a run values of a server are that nobody checked, should it be caught lying."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from shoal.base.ids import PeerId, short


class Suspects:
    """What servers gave unchecked, step by step."""

    def __init__(self, done: int, kept: Callable[[], Sequence[int]]) -> None:
        """`done` steps were made before: nobody remembers whose values are in them. `kept` says
        after which steps there are checkpoints."""
        self._done = done
        self._kept = kept
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
                self._steps[peer] = (self._steps.get(peer, (step, step))[0], step)
        return self.between(f"in step {step}", unchecked, caught)

    def between(
        self, where: str, unchecked: Mapping[PeerId, int], caught: Iterable[PeerId]
    ) -> list[str]:
        """The same after what changed nothing that is learned: an evaluation, or a step that was
        broken off."""
        self._counts.update(unchecked)
        new = [peer for peer in caught if peer not in self._told]
        self._told.update(new)
        return [
            f"peer {short(peer)} gave wrong values {where} and is not used any more; "
            + self._unchecked_of(peer)
            for peer in new
        ]

    def disputed(self, peers: Sequence[PeerId]) -> list[str]:
        """What is to be told when these contradict each other, and the run ends."""
        return [f"peer {short(peer)}: if it is wrong, {self._unchecked_of(peer)}" for peer in peers]

    def _unchecked_of(self, peer: PeerId) -> str:
        if peer not in self._steps:
            return f"all that it gave since step {self._done + 1} was checked"
        first, last = self._steps[peer]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        return f"what it gave unchecked is in {steps}: {self._way_back(first)}"

    def _way_back(self, first: int) -> str:
        before = max((step for step in self._kept() if step < first), default=None)
        if before is None:
            return "to be rid of it begin anew, no checkpoint from before is kept"
        return f"to be rid of it go on from step {before} (--resume DIR --from-step {before})"
