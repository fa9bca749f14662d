"""Text that ends at the first stop string, however its pieces come."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Feed pieces, get what may be shown. Holds back what may be the start of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.is_stopped = False
        """A stop string came; it and all after it are left out."""

    def push(self, piece: str) -> str:
        """What `piece` and the text that was held back let be shown."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held, self.is_stopped = "", True
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
