"""The line that says what an answer waits for while no servers can be found for it."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable
from typing import Final, TextIO

from shoal.base.errors import NoRouteError
from shoal.base.ids import SessionId
from shoal.client.waiting import Waiting

GRACE_S: Final = 1.0
"""Shorter waits are not worth a word: most repairs take less."""

TICK_S: Final = 0.2
"""Between two pictures of the line at a terminal."""

LINE_PERIOD_S: Final = 10.0
"""Between two lines where no terminal is, unless there is news."""

SPINNER: Final = "|/-\\"
"""In any font."""


class WaitingLine:
    """Shows a session's `Waiting` on stderr: a line that changes, or a few lines in a log.

    `told` is for `ClientConfig.on_waiting`.
    """

    def __init__(self, stream: TextIO | None = None, *, is_terminal: bool | None = None) -> None:
        self.break_line: Callable[[], None] = lambda: None
        """Called before the first picture: whoever writes text may be within a line."""
        self.is_wanted: Callable[[], bool] = lambda: True
        """Whether anybody waits for an answer now."""
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty() if is_terminal is None else is_terminal
        self._waiting: dict[SessionId, Waiting] = {}
        self._started_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._num_shown = 0
        self._said = ("", 0.0)
        """What was last shown where no terminal is, and when."""

    def told(self, session: SessionId, waiting: Waiting | None) -> None:
        """A session waits, or does so no more."""
        loop = asyncio.get_running_loop()
        if waiting is None:
            self._waiting.pop(session, None)
            if not self._waiting:
                self._end(loop.time())
            return
        self._waiting[session] = waiting
        if self._timer is None:
            self._started_s, self._num_shown = loop.time(), 0
            self._timer = loop.call_later(GRACE_S, self._tick)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        if self.is_wanted():
            self._show(loop.time())
        self._timer = loop.call_later(TICK_S, self._tick)

    def _show(self, now_s: float) -> None:
        waiting = next(iter(self._waiting.values()))
        left_s = max(0.0, waiting.deadline_s - now_s)
        if not self._num_shown:
            self.break_line()
        if self._is_terminal:
            sign = SPINNER[self._num_shown % len(SPINNER)]
            width = shutil.get_terminal_size().columns
            text = f"{sign} waiting, {left_s:.0f} s left: {waiting}"
            self._write(f"\r\x1b[K{text[: width - 1]}")
        elif self._said[0] != str(waiting) or now_s - self._said[1] >= LINE_PERIOD_S:
            self._said = (str(waiting), now_s)
            self._write(f"waiting, {left_s:.0f} s left: {waiting}\n")
        self._num_shown += 1

    def _end(self, now_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._said = None, ("", 0.0)
        if self._num_shown:
            erased = "\r\x1b[K" if self._is_terminal else ""
            self._write(f"{erased}[waited {now_s - self._started_s:.1f} s]\n")
        self._num_shown = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def with_hint(error: NoRouteError, model: str) -> NoRouteError:
    """The same error with the command that starts a server of what is missing."""
    if not error.missing:
        return error
    commands = " and ".join(
        f"shoal serve {model} --blocks {start}:{end} --join ADDR" for start, end in error.missing
    )
    return NoRouteError(
        f"{error.detail}; start what is missing: {commands}",
        missing=error.missing,
        retry_after_s=error.retry_after_s,
    )
