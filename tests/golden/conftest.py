"""The golden tier runs in scripts/test; scripts/check runs only the three first families."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
QUICK = "test_chain_equals_model.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder but the quick file as slow."""
    for item in items:
        if item.path.parent == HERE and item.path.name != QUICK:
            item.add_marker(pytest.mark.slow)
