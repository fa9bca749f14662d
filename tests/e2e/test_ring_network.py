"""A ring of four machines on a wireless LAN: network namespaces whose links carry 50 Mbit/s."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess

import pytest

from tests.e2e.processes import ENVIRONMENT, SHOAL, Process, alone, end_all
from tests.e2e.recovery_networks import Networks, missing

TC = shutil.which("tc")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(missing()) or TC is None, reason=missing() or "no tc here"),
]

NODES = ("a", "b", "c")
RATE = "50mbit"
PROMPTS = ("The sea is calm", "A dog and its", "Ring the bell, ring it well and")
SAMPLES = 7
TOKENS = 24


@pytest.fixture(scope="module")
def lan():
    """A starter's network and three nodes', each behind a link that is shaped both ways."""
    with Networks(["starter", *NODES]) as networks:
        networks.shape(RATE)
        yield networks


@pytest.fixture(scope="module")
def ring(nursery, model, tmp_path_factory, lan):
    """A ring that is up; its file."""
    folder = tmp_path_factory.mktemp("ring")
    file = folder / "ring.json"
    started = [
        Process(
            "ring", "up", "--model", str(model), "--nodes", "3", "--ring", str(file),
            "--listen", f"tcp://{lan.host('starter')}:0",
            launch=nursery.launch(lan.namespace("starter")),
        )
    ]  # fmt: skip
    try:
        line = started[0].wait_line(started[0].out, "join with: shoal ring join")
        joined = line.partition("shoal ring join")[2].split()
        for name in NODES:
            arguments = ["ring", "join", *joined, "--listen", f"tcp://{lan.host(name)}:0"]
            started.append(Process(*arguments, launch=nursery.launch(lan.namespace(name))))
        started[0].wait_line(started[0].out, "ready ring=")
        yield file
    finally:
        end_all(started)


def run(lan, ring, *arguments):
    """`shoal ring run` on the starter's machine."""
    command = [*lan.inside("starter"), SHOAL, "ring", "run"]
    return subprocess.run(
        [*command, "--ring", str(ring), *arguments],
        capture_output=True, text=True, timeout=100, env=ENVIRONMENT,
    )  # fmt: skip


def test_samples_round_a_ring_on_a_slow_network(lan, ring, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS), encoding="utf-8")
    done = run(
        lan, ring, "--prompts-file", str(tmp_path / "prompts.txt"), "--samples", str(SAMPLES),
        "--max-new-tokens", str(TOKENS), "--csv", str(tmp_path / "tokens.csv"), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    wanted = {prompt: alone(model, prompt, TOKENS)[0] for prompt in PROMPTS}
    assert len(answer["samples"]) == SAMPLES
    for sample in answer["samples"]:
        assert sample["token_ids"] == wanted[sample["prompt"]]
        assert len(sample["chain"]) == 3
        assert sample["recoveries"] == []
    assert sum(node["end"] - node["start"] for node in answer["nodes"]) == blocks
    rows = list(csv.reader((tmp_path / "tokens.csv").read_text().splitlines()))
    assert [int(count) for _, count in rows] == list(range(1, answer["tokens"] + 1))
    assert [float(at_s) for at_s, _ in rows] == sorted(float(at_s) for at_s, _ in rows)
    # All of it went through the shaped links.
    assert all(lan.sent_bytes(name) > 10_000 for name in ("starter", *NODES))


def test_what_can_not_be_run_is_said_at_once(lan, ring, tmp_path):
    done = run(lan, ring, "--prompt", "The sea", "--max-new-tokens", "100000")
    assert done.returncode != 0
    assert "does not fit" in done.stderr or "too long" in done.stderr, done.stderr
    done = run(lan, tmp_path / "none.json", "--prompt", "The sea")
    assert "no ring is up" in done.stderr
