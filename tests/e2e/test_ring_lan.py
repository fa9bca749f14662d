"""A ring whose machines find each other: multicasts in one local network, no address anywhere."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.e2e.lan_networks import LocalNetwork
from tests.e2e.processes import ENVIRONMENT, SHOAL, Process, alone, end_all
from tests.e2e.recovery_networks import missing

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing()), reason=missing())]

PROMPT = "The sea is calm"
TOKENS = 8


def test_nodes_find_their_starter_in_the_local_network(nursery, model, tmp_path):
    file = tmp_path / "ring.json"
    started = []
    with LocalNetwork(["starter", "a", "b"]) as network:
        try:
            up = Process(
                "ring", "up", "--model", str(model), "--nodes", "2", "--lan", "--ring", str(file),
                launch=nursery.launch(network.namespace("starter")),
            )  # fmt: skip
            started.append(up)
            line = up.wait_line(up.out, "in this network: shoal ring join --lan")
            arguments = line.partition("shoal ring join")[2].split()
            for name in ("a", "b"):
                launch = nursery.launch(network.namespace(name))
                started.append(Process("ring", "join", *arguments, "--name", name, launch=launch))
            up.wait_line(up.out, "ready ring=")
            assert network.host("starter") in up.out[0]
            done = subprocess.run(
                [*network.inside("starter"), SHOAL, "ring", "run", "--ring", str(file), "--prompt",
                 PROMPT, "--samples", "2", "--max-new-tokens", str(TOKENS), "--json"],
                capture_output=True, text=True, timeout=100, env=ENVIRONMENT,
            )  # fmt: skip
        finally:
            end_all(started)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert [one["text"] for one in answer["samples"]] == [alone(model, PROMPT, TOKENS)[1]] * 2
    assert {node["name"] for node in answer["nodes"]} == {"a", "b"}
