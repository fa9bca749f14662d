"""`shoal bench MODEL` with real servers."""

import json

import pytest

from tests.e2e.processes import run

pytestmark = pytest.mark.e2e


def test_a_model_is_measured_whole_and_served(model):
    result = run("bench", str(model), "--quick", "--servers", "1", "--threads", "1", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout.splitlines()[-1])
    assert [row["way"] for row in said["rows"]] == ["transformers, 1 process", "shoal, 1 server"]
    assert all(row["tokens_per_s"] > 0 for row in said["rows"])
    assert said["rows"][0]["share"] == 1.0
    assert said["hop_ms"] is None
