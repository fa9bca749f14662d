"""A private swarm: the invite lets in, nothing else does; a lasting identity."""

import json
import signal

import pytest

from tests.e2e.processes import Server, error_line, run

pytestmark = pytest.mark.e2e


def test_only_the_invited_are_let_in(model, tmp_path):
    made = run("swarm", "new", "friends", "--key", str(tmp_path / "swarm.key"))
    invite = made.stdout.splitlines()[-1]
    key = tmp_path / "peer.key"
    options = ("--invite", invite, "--identity", str(key), "--announce", "tcp://localhost:0")
    server = Server(model, "0:7", *options).ready()
    try:
        assert "@localhost:" in server.address
        inside = run("status", "--join", server.address, "--invite", invite, "--json")
        assert inside.returncode == 0, inside.stderr
        (served,) = json.loads(inside.stdout)["models"]
        assert [one["peer"] for one in served["servers"]] == [server.peer]
        for stranger in ((), ("--swarm", "friends")):
            outside = run("status", "--join", server.address, *stranger)
            assert outside.returncode == 1
            line = error_line(outside.stderr)
            assert "wrong swarm" in line or "private" in line
    finally:
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.report()
        server.end()
    again = Server(model, "0:1", "--identity", str(key)).ready()
    again.end()
    assert again.peer == server.peer
