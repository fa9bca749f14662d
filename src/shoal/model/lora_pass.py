"""Which rows of the pass under way go through which adapter."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from shoal.base.adapters import AdapterId


@dataclass(frozen=True, slots=True)
class LoraRun:
    """Rows [start, end) of a pass, all of one adapter; `end` None: to the last."""

    adapter: AdapterId
    start: int
    end: int | None
    is_tiled: bool
    """Whether their number may differ when they are computed again."""


class _Pass(threading.local):
    """The pass under way on this thread."""

    runs: Sequence[LoraRun] = ()
    num_rows: int | None = None


current_pass: Final = _Pass()


@contextmanager
def lora_running(runs: Sequence[LoraRun], num_rows: int | None = None) -> Iterator[None]:
    """While a pass with these rows goes through blocks on this thread.

    `num_rows` are the pass's, padding included; None: whatever the layers get is one run.
    """
    current_pass.runs, current_pass.num_rows = runs, num_rows
    try:
        yield
    finally:
        current_pass.runs = ()
