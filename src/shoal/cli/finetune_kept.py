"""Checkpoints of a run that are kept beside the last one: ways back from before a server lied."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from shoal.base.errors import ConfigError

FOLDER: Final = "checkpoints"

KEPT_MAX: Final = 12
"""Of one run: each holds the values learned and the optimiser's two moments of each."""

_NAME: Final = re.compile(r"step-(\d{1,12})\.safetensors")


class KeptCheckpoints:
    """Those in the folder of a run."""

    def __init__(self, out: Path) -> None:
        self._folder = out / FOLDER

    def path(self, step: int) -> Path:
        """Where the one after a step is."""
        return self._folder / f"step-{step}.safetensors"

    def steps(self) -> list[int]:
        """Which there are, rising."""
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in found if match is not None)

    def keep(self, step: int, write: Callable[[Path], None]) -> None:
        """Have one more written. Those of later steps go, which belong to a way that was left,
        and of older ones so many that no more than `KEPT_MAX` remain.

        Raises:
            ConfigError: it can't be written.
        """
        try:
            self._folder.mkdir(exist_ok=True)
            write(self.path(step))
            steps = self.steps()
            later = [one for one in steps if one > step]
            for one in (*later, *superfluous(steps[: len(steps) - len(later)], KEPT_MAX)):
                self.path(one).unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"can't write to {self._folder}: {error}") from error


def superfluous(steps: Sequence[int], most: int) -> list[int]:
    """Which of these rising steps need not be kept: what is left lies the closer together the
    newer it is, and the first and the last stay (`most` is at least 2)."""
    left, gone = list(steps), list[int]()
    while len(left) > most:
        newest = left[-1]
        at = min(
            range(1, len(left) - 1),
            key=lambda i: (left[i + 1] - left[i - 1]) / (newest - left[i - 1]),
        )
        gone.append(left.pop(at))
    return gone
