"""Frozen surface: the names that `shoal.hf` exports; and what it shares with the commands."""

from __future__ import annotations

import subprocess
import sys

import pytest

import shoal.hf
from shoal.cli import options
from shoal.hf import connection

PUBLIC_NAMES = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "ChainCache",
    "DistributedModelForCausalLM",
    "DistributedModelForSequenceClassification",
    "LocalSwarm",
    "Session",
]


def test_public_names_are_frozen() -> None:
    assert sorted(shoal.hf.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(shoal.hf, name).__name__ == name
        assert name in dir(shoal.hf)
    with pytest.raises(AttributeError, match="no attribute 'Model'"):
        _ = shoal.hf.Model


def test_the_swarm_without_a_name_is_the_same_as_on_the_command_line() -> None:
    assert connection.DEFAULT_SWARM == options.DEFAULT_SWARM


def test_what_commands_import_of_it_does_not_import_torch() -> None:
    script = "import shoal.hf.connection, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
