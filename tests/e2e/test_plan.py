"""`shoal plan --live` against servers of their own processes."""

import json

import pytest

from shoal.base.spans import parse_span
from shoal.cli.app import run

pytestmark = pytest.mark.e2e


def test_a_live_swarm_is_planned(model, serve, capsys):
    """Both servers hold the first blocks; the plan sends one of them to the others."""
    swarm = serve(model, ["0:2", "0:2"])
    live = ["plan", "--live", "--join", swarm[0].address]
    assert run([*live, "--json", "--model", str(model)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert min(plan["replicas"]) >= 1
    assert len(plan["servers"]) == 2
    assert plan["figures"]["step_s"] > 0
    assert plan["present"]["step_s"] is None
    assert plan["change"]["moves"]
    assert run([*live, "--commands", "--model", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split() for line in lines if not line.startswith("#")]
    assert commands
    for words in commands:
        assert words[:3] == ["shoal", "serve", str(model)]
        assert parse_span(words[words.index("--blocks") + 1]).end <= len(plan["replicas"])
    assert run([*live, "--model", "nowhere"]) == 2
    assert "the swarm serves" in capsys.readouterr().err
