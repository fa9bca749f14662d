"""What every test gets: nothing it sets for the whole process outlives it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _log_levels_are_restored() -> Iterator[None]:
    """Commands that run in this process set the level of all of `shoal`."""
    logger = logging.getLogger("shoal")
    level = logger.level
    yield
    logger.setLevel(level)
