"""Where libraries in C print: not between the lines that a command answers with."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT, STDERR = 1, 2


@contextmanager
def c_prints_to_stderr() -> Iterator[None]:
    """Meanwhile stdout is stderr: nothing is to be answered inside.

    HiGHS prints a line of its own now and then, whatever it is told: it would end up in the JSON.
    """
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    os.dup2(STDERR, STDOUT)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)  # what C keeps back would come later, and in the wrong place
        os.dup2(kept, STDOUT)
        os.close(kept)
