"""What libraries in C print: not between the lines that a command answers with."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STDOUT = 1


@contextmanager
def c_prints_nothing() -> Iterator[None]:
    """Meanwhile stdout goes nowhere: nothing is to be answered inside.

    HiGHS prints a line of its own now and then, whatever it is told (scipy has no option for it):
    it would end up in the JSON, or in the middle of a progress bar.
    """
    sys.stdout.flush()
    kept = os.dup(STDOUT)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)  # what C keeps back would come later, and in the wrong place
        os.dup2(kept, STDOUT)
        os.close(kept)
