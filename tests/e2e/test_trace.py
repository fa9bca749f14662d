"""Servers that record themselves, one of them killed; the incident plays again in the lab."""

import json
import signal

import pytest

from shoal.lab.campaign import quiet
from shoal.lab.trace_incident import find_incident
from shoal.lab.trace_reading import read_traces
from shoal.lab.trace_replay import run_replay
from shoal.lab.trace_report import is_same_story
from tests.e2e.processes import Process, Server, alone, end_all, wait_until

pytestmark = pytest.mark.e2e

PROMPT = "What the sea gives, the sea takes."
TOKENS = "150"


def count(path, kind):
    return path.read_bytes().count(f'"e":"{kind}"'.encode()) if path.exists() else 0


def test_a_killed_server_and_its_replay(model, tmp_path):
    files = [tmp_path / f"{name}.trace" for name in "abc"]
    started, join = [], None
    try:
        for blocks, file in zip(("0:2", "2:7", "2:7"), files, strict=True):
            started.append(Server(model, blocks, "--trace", str(file), join=join))
            join = started[0].ready().address
            started[-1].ready()
        command = ("generate", str(model), "--join", join, "--prompt", PROMPT)
        client = Process(*command, "--max-new-tokens", TOKENS, "--json")
        started.append(client)
        wait_until(lambda: max(count(file, "out") for file in files[1:]) > 40, "half an answer")
        busy = 1 if count(files[1], "out") else 2
        started[busy].signal(signal.SIGKILL)
        assert client.wait(100) == 0, client.report()
        assert json.loads(client.out[-1])["token_ids"] == alone(model, PROMPT, int(TOKENS))[0]
    finally:
        end_all(started)
    check_contents(files)
    incident = find_incident(read_traces(files))
    assert len(incident.servers) == 3
    (past,) = incident.sessions
    assert len(past.chains) == 2
    labels = {one.peer: one.label for one in incident.servers}
    lost, taken = (labels[started[index].peer[:8]] for index in (busy, 3 - busy))
    assert [hop[0] for hop in past.chains[0]] == ["s0", lost]
    assert [hop[0] for hop in past.chains[1]] == ["s0", taken]
    (dead,) = (one for one in incident.servers if one.label == lost)
    assert dead.lives[0].how == "killed"
    with quiet():
        replay = run_replay(incident, 0)
    assert is_same_story(past, replay.incident.sessions[0])
    assert not replay.ended


def check_contents(files):
    """What must not be in a trace: addresses, whole ids, the prompt."""
    for file in files:
        text = file.read_text()
        assert "127.0.0.1" not in text
        assert "sea" not in text
