"""Real processes: a gateway over servers that are killed, its dashboard, Ctrl-C."""

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from http.client import HTTPException
from urllib.request import Request, urlopen

import pytest

from tests.e2e.processes import Process, alone, end_all, error_line, run, wait_until

pytestmark = pytest.mark.e2e

READY = re.compile(r"ready url=(?P<url>\S+)( model=(?P<model>\S+))?\n")


def started(*arguments: str) -> tuple[Process, str]:
    """A command that answers HTTP, and where."""
    process = Process(*arguments, "--listen", "127.0.0.1:0")
    match = READY.fullmatch(process.wait_line(process.out, "ready "))
    assert match, process.out
    return process, match["url"]


@pytest.fixture
def swarm(model, serve):
    """Blocks 3 to 7 twice: one of these may be killed."""
    (first,) = serve(model, ["0:3"])
    return [first, *serve(model, ["3:7", "3:7"], join=first.address)]


def post(url: str, body: dict) -> Iterator[dict]:
    """The chunks of a streamed completion."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    with urlopen(Request(f"{url}/v1/completions", data), timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line.removeprefix(b"data: "))


def test_a_killed_server_is_a_pause(model, swarm):
    process, url = started("gateway", str(model), "--join", swarm[0].address, "--threads", "1")
    try:
        servers = {server.peer: server for server in swarm}
        text, busy = "", ""
        body = {"prompt": "The sea", "max_tokens": 150, "temperature": 0}
        for number, chunk in enumerate(post(url, body)):
            text += chunk["choices"][0]["text"] if chunk["choices"] else ""
            last = chunk
            if number == 0:
                busy = chunk["shoal"]["chain"][1]["peer"]
            if number == 10:
                servers[busy].signal(signal.SIGKILL)
        assert text == alone(model, "The sea", 150)[1]
        (recovery,) = last["shoal"]["recoveries"]
        assert recovery["lost"] == [busy]

        def told() -> set[str]:
            state = json.loads(urlopen(f"{url}/swarm.json", timeout=30).read())
            return {event["kind"] for event in state["events"] if event["peer"] == busy}

        wait_until(lambda: "repaired" in told() and told() & {"lost", "left"}, "the dashboard")
        with contextlib.suppress(OSError, HTTPException):  # it may be cut
            for number, _ in enumerate(post(url, {**body, "max_tokens": 400})):
                if number == 3:
                    process.signal(signal.SIGINT)
        assert process.wait() == 0
        assert "Traceback" not in "".join(process.err)
    finally:
        end_all([process])


def test_a_dashboard_by_itself(swarm):
    process, url = started("dashboard", "--join", swarm[0].address)
    try:
        assert url.endswith("/swarm")
        assert b"<title>Shoal swarm" in urlopen(url, timeout=30).read()
        (model,) = json.loads(urlopen(f"{url}.json", timeout=30).read())["models"]
        assert [server["blocks"] for server in model["servers"]] == [[0, 3], [3, 7], [3, 7]]
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    finally:
        end_all([process])


def test_others_are_let_in_on_purpose_only(model):
    for command in (("gateway", str(model)), ("dashboard",)):
        result = run(*command, "--join", f"tcp://{'a' * 52}@127.0.0.1:1", "--listen", "0.0.0.0:0")
        assert result.returncode == 2
        assert "--open" in error_line(result.stderr)
