"""Three servers and a client: the same text as one machine, and nobody can spoil it."""

import json
import signal
import socket

import pytest

from tests.e2e.processes import (
    Process,
    alone,
    error_line,
    generate,
    run,
    servers,
    wait_until,
)

pytestmark = pytest.mark.e2e

SPANS = ("0:2", "2:5", "5:7")
PROMPT = "What the sea gives, the sea takes."
LONG = "400"
"""New tokens of an answer that lasts long enough to meddle with."""


@pytest.fixture(scope="module")
def swarm(model, serve):
    return serve(model, SPANS)


def test_greedy_answer_equals_transformers(model, swarm):
    token_ids, text = alone(model, PROMPT, 60)
    answer = generate(model, swarm[0].address, PROMPT, "--max-new-tokens", "60")
    assert answer["token_ids"] == token_ids
    assert answer["text"] == text
    assert list(answer) == [
        "text",
        "token_ids",
        "prompt_tokens",
        "resumed_tokens",
        "time_to_first_token_s",
        "tokens_per_s",
        "chain",
        "recoveries",
        "moves",
        "numerics",
    ]
    assert answer["prompt_tokens"] == len(PROMPT)
    assert answer["chain"] == [
        {"peer": server.peer, "blocks": [int(end) for end in blocks.split(":")]}
        for server, blocks in zip(swarm, SPANS, strict=True)
    ]
    assert answer["recoveries"] == []
    assert answer["moves"] == []
    assert answer["tokens_per_s"] > 0
    assert answer["time_to_first_token_s"] > 0


def test_streamed_text_is_the_text_and_seeds_repeat(model, swarm, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT)
    sampling = ("--temperature", "0.9", "--seed", "5", "--max-new-tokens", "30")
    answer = generate(model, swarm[2].address, PROMPT, *sampling)
    join = ("--join", swarm[1].address)
    streamed = run("generate", str(model), *join, "--prompt-file", str(prompt), *sampling)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout == answer["text"] + "\n"
    assert "tokens/s" in streamed.stderr


def test_status_shows_the_swarm(swarm):
    result = run("status", "--join", swarm[1].address, "--json")
    assert result.returncode == 0, result.stderr
    (model,) = json.loads(result.stdout)["models"]
    assert model["missing"] == []
    assert model["num_blocks"] == 7
    assert [server["peer"] for server in model["servers"]] == [server.peer for server in swarm]
    for server in model["servers"]:
        assert server["state"] == "online"
        assert server["rtt_s"] > 0
        assert server["decode_s_per_block"] > 0
        assert server["cache_tokens"] == 8192
    table = run("status", "--join", swarm[1].address)
    assert swarm[2].peer[:8] in table.stdout
    assert "all 7 blocks are served" in table.stdout


def test_another_model_is_refused_by_name(model, other_model, swarm):
    result = run("generate", str(other_model), "--join", swarm[0].address, "--prompt", "x")
    assert result.returncode == 2
    line = error_line(result.stderr)
    served = {one["model"] for one in status(swarm[0].address)["models"]}
    assert len(served) == 1
    assert served.pop() in line
    assert str(other_model) in line
    assert "same model" in line


def status(join):
    return json.loads(run("status", "--join", join, "--json").stdout)


def test_another_swarm_is_refused(model, swarm):
    result = run("status", "--join", swarm[0].address, "--swarm", "strangers")
    assert result.returncode == 1
    assert "wrong swarm" in error_line(result.stderr)


def start_answer(model, swarm):
    """A client in the middle of a long answer."""
    before = servers(swarm[0].address)[swarm[1].peer]["iterations"]
    command = ("generate", str(model), "--join", swarm[0].address, "--prompt", PROMPT, "--json")
    client = Process(*command, "--max-new-tokens", LONG)

    def is_running():
        return servers(swarm[0].address)[swarm[1].peer]["iterations"] > before + 5

    wait_until(is_running, "an answer in progress")
    return client


def all_free(swarm):
    return all(
        server["free_tokens"] == server["cache_tokens"] and server["sessions"] == 0
        for server in servers(swarm[0].address).values()
    )


def test_garbage_on_the_port_hurts_nobody(model, swarm):
    client = start_answer(model, swarm)
    port = int(swarm[1].address.rsplit(":", 1)[1])
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(4000), b"\0" * 99):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    assert client.wait(60) == 0, client.report()
    answer = json.loads(client.out[-1])
    client.end()
    assert answer["recoveries"] == []
    assert answer["token_ids"] == alone(model, PROMPT, int(LONG))[0]


def test_a_killed_client_leaves_no_memory_behind(model, swarm):
    client = start_answer(model, swarm)
    client.signal(signal.SIGKILL)
    assert client.wait() == -signal.SIGKILL
    client.end()
    wait_until(lambda: all_free(swarm), "memory of a killed client freed", 15.0)


def test_ctrl_c_ends_an_answer_with_one_line(model, swarm):
    client = start_answer(model, swarm)
    client.signal(signal.SIGINT)
    assert client.wait() == 130, client.report()
    said = [line for line in client.err if " INFO " not in line and line.strip()]
    client.end()
    assert said == ["interrupted\n"]
    wait_until(lambda: all_free(swarm), "memory of an interrupted client freed", 15.0)
