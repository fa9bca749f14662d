"""Ctrl-C while libraries are imported and files are opened, before an event loop runs."""

from __future__ import annotations

import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noticing_interrupts(*numbers: signal.Signals) -> Iterator[None]:
    """In the block these signals are KeyboardInterrupt, whatever a library makes of it.

    An import that is interrupted may swallow the interrupt, or fail with some error about
    a half-imported module: the block ends with KeyboardInterrupt all the same. Main thread
    only; the handlers from before are back afterwards.
    """
    is_seen = False

    def notice(number: int, frame: types.FrameType | None) -> None:
        nonlocal is_seen
        is_seen = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, notice) for number in numbers}
    try:
        yield
    except Exception:
        if is_seen:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if is_seen:
        raise KeyboardInterrupt
