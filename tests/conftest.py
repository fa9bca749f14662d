"""What every test gets: nothing it sets for the whole process outlives it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

# Before torch is imported: the last bits of a sum depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _log_levels_are_restored() -> Iterator[None]:
    """Commands that run in this process set the level of all of `shoal`."""
    logger = logging.getLogger("shoal")
    level = logger.level
    yield
    logger.setLevel(level)
