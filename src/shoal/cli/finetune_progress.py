"""What a training run shows while it runs, and how Ctrl-C ends it: on stderr."""

from __future__ import annotations

import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shoal.hf.tuning_checkpoint import Evaluated, StepDone

LINES_WANTED: Final = 20
"""Where stderr is no terminal: about so many lines a run."""

RECENT_STEPS: Final = 10
"""Speed and time left are those of the last steps: servers come and go."""


class Stopping:
    """The first Ctrl-C asks for the end after this step, the second one ends at once."""

    def __init__(self) -> None:
        self.is_asked = False

    @contextmanager
    def noticing(self) -> Iterator[Stopping]:
        """Main thread only; the handler from before is back afterwards."""
        before = signal.signal(signal.SIGINT, self._notice)
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _notice(self, number: int, frame: types.FrameType | None) -> None:
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        print(
            "\nfinishing this step, then saving; press Ctrl-C again to stop at once",
            file=sys.stderr,
            flush=True,
        )


class TrainingLine:
    """A bar with loss, tokens/s and the time left; lines now and then without a terminal."""

    def __init__(self, num_steps: int, done: int) -> None:
        self._num_steps = num_steps
        self._done = done
        self._recent: list[StepDone] = []
        self._bar: Any = None
        self._task: Any = None

    @contextmanager
    def shown(self) -> Iterator[TrainingLine]:
        """Shows while it is open."""
        if not sys.stderr.isatty():
            yield self
            return
        from rich import progress
        from rich.console import Console

        columns = (
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TextColumn("{task.description}"),
        )
        with progress.Progress(*columns, console=Console(stderr=True)) as bar:
            self._bar = bar
            self._task = bar.add_task("", total=self._num_steps, completed=self._done)
            yield self
        self._bar = None

    def stepped(self, done: StepDone) -> None:
        """One step more."""
        self._recent = [*self._recent, done][-RECENT_STEPS:]
        self._done = done.step
        text = self._text(done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done.step, description=text)
        elif done.step % max(1, self._num_steps // LINES_WANTED) == 0 or done.step == 1:
            print(f"step {done.step} of {self._num_steps}: {text}", file=sys.stderr, flush=True)

    def evaluated(self, found: Evaluated) -> None:
        """An evaluation."""
        right = "" if found.accuracy is None else f", {found.accuracy:.1%} right"
        text = f"evaluation after step {found.step}: loss {found.loss:.4f}{right}"
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _text(self, done: StepDone) -> str:
        taken_s = sum(one.duration_s for one in self._recent)
        tokens_per_s = sum(one.num_tokens for one in self._recent) / max(taken_s, 1e-9)
        left_s = taken_s / len(self._recent) * (self._num_steps - done.step)
        return f"loss {done.loss:.4f}, {tokens_per_s:.0f} tokens/s, {_duration(left_s)} left"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
