"""What a training run shows while it runs, and how Ctrl-C ends it: on stderr."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shoal.base.spans import Span
    from shoal.hf.tuning_checkpoint import Evaluated, StepDone

LINES_WANTED: Final = 20
"""Where stderr is no terminal: about so many lines a run."""

LOOK_S: Final = 2.0
"""How often to look whether servers are missing while a step is under way."""

RECENT_STEPS: Final = 10
"""Speed and time left are those of the last steps: servers come and go."""

STDERR: Final = 2
STOPPING_TEXT: Final = b"\nfinishing this step, then saving; press Ctrl-C again to stop at once\n"


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
        # Not print: the signal may have struck in the middle of one, which can't be entered twice.
        os.write(STDERR, STOPPING_TEXT)


class TrainingLine:
    """A bar with loss, tokens/s and the time left; lines now and then without a terminal."""

    def __init__(self, num_steps: int, done: int) -> None:
        self._num_steps = num_steps
        self._done = done
        self._recent: list[StepDone] = []
        self._bar: Any = None
        self._task: Any = None
        self._waits_for = ""
        """What was last said to be missing."""

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

    @contextmanager
    def watching(
        self, missing: Callable[[], Sequence[Span]], look_s: float = LOOK_S
    ) -> Iterator[None]:
        """Say meanwhile which blocks nobody has: a step waits for them, and nothing moves.

        `missing` is called on a thread of its own. What is over by the next look is not said.
        """
        ended = threading.Event()

        def look() -> None:
            before = ""
            while not ended.wait(look_s):
                names = ", ".join(map(str, missing()))
                if names == before:
                    self._say_missing(names)
                before = names

        thread = threading.Thread(target=look, name="shoal finetune", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _say_missing(self, names: str) -> None:
        if names == self._waits_for:
            return
        self._waits_for = names
        text = f"waiting for servers of blocks {names}" if names else "all blocks have servers"
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            print(text, file=sys.stderr, flush=True)

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
        self.say(f"evaluation after step {found.step}: loss {found.loss:.4f}{right}")

    def say(self, text: str) -> None:
        """A line that stays."""
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
