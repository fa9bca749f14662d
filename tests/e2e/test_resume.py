"""Clients that are killed, blocks that nobody has for a while: the text is the same in the end."""

import json
import signal

import pytest

from shoal.base.errors import ConfigError
from shoal.cli.answer_file import load_answer
from tests.e2e.processes import (
    Process,
    Server,
    alone,
    end_all,
    error_line,
    generate,
    run,
    servers,
    wait_until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = "What the sea gives, the sea takes."
LONG = 400
SAMPLED = ("--temperature", "0.8", "--seed", "41")


@pytest.fixture(scope="module")
def swarm(model, serve):
    return serve(model, ("0:2", "2:5", "5:7"))


def start(model, join, *extra):
    """An answer that lasts for a while, with its text on stdout."""
    command = ("generate", str(model), "--join", join, "--prompt", PROMPT, "--threads", "1")
    return Process(*command, "--max-new-tokens", str(LONG), *extra)


def num_saved(path):
    try:
        return len(load_answer(path).token_ids)
    except ConfigError:
        return 0


def resume(path, join, *extra):
    command = ("generate", "--resume", str(path), "--join", join, "--threads", "1", "--json")
    result = run(*command, *extra)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_killed_client_is_forgotten_and_its_answer_goes_on(model, swarm, tmp_path):
    """What it held at the servers is free again; the text is that of an undisturbed run."""
    join, path = swarm[0].address, tmp_path / "answer"
    before = {peer: one["free_tokens"] for peer, one in servers(join).items()}
    client = start(model, join, "--save", str(path))
    wait_until(lambda: num_saved(path) > 10, "tokens in the file")
    held = servers(join)
    assert [one["sessions"] for one in held.values()] == [1, 1, 1]
    assert all(held[peer]["free_tokens"] < free for peer, free in before.items())
    client.signal(signal.SIGKILL)
    client.wait()
    client.end()
    wait_until(
        lambda: all(one["sessions"] == 0 for one in servers(join).values()),
        "sessions of the killed client are closed",
    )
    assert {peer: one["free_tokens"] for peer, one in servers(join).items()} == before
    num_before = num_saved(path)
    assert 10 < num_before < LONG
    answer = resume(path, join)
    assert answer["resumed_tokens"] == num_before
    assert (answer["token_ids"], answer["text"]) == alone(model, PROMPT, LONG)
    assert answer["numerics"] in ("exact", "same-class")
    assert num_saved(path) == LONG


def test_a_sampled_answer_goes_on_too_and_again_and_further(model, swarm, tmp_path):
    join, path = swarm[0].address, tmp_path / "answer"
    whole = generate(model, join, PROMPT, *SAMPLED, "--max-new-tokens", "60")
    short = run(
        "generate", str(model), "--join", join, "--prompt", PROMPT, *SAMPLED,
        "--max-new-tokens", "20", "--save", str(path),
    )  # fmt: skip
    assert short.returncode == 0, short.stderr
    complete = run("generate", "--resume", str(path), "--join", join)
    assert complete.stdout == short.stdout
    assert "the answer was complete" in complete.stderr
    answer = resume(path, join, "--max-new-tokens", "60")
    assert (answer["token_ids"], answer["text"]) == (whole["token_ids"], whole["text"])
    assert answer["resumed_tokens"] == 20


def test_an_answer_waits_for_a_server_that_is_missing(model, swarm, tmp_path):
    """First until its patience is over, then, resumed, until the blocks are back."""
    join, path = swarm[0].address, tmp_path / "answer"
    victim = Server(model, "2:5", join=join).ready()
    swarm[1].signal(signal.SIGSTOP)  # the other one is all there is
    started = [victim]
    try:
        client = start(model, join, "--save", str(path), "--patience", "12")
        started.append(client)
        wait_until(lambda: num_saved(path) > 10, "tokens in the file")
        victim.signal(signal.SIGKILL)
        victim.wait()
        assert client.wait(60) == 1, client.report()
        waiting = next(line for line in client.err if line.startswith("waiting, "))
        assert "no server for blocks [2,5)" in waiting
        assert "".join(client.err).count("Traceback") == 0
        error = error_line("".join(client.err))
        assert "[2,5)" in error
        assert f"shoal generate --resume {path}" in "".join(client.err)

        again = Process(
            "generate", "--resume", str(path), "--join", join, "--threads", "1", "--json"
        )
        started.append(again)
        again.wait_line(again.err, "waiting, ")
        replacement = Server(model, "2:5", join=join)
        started.append(replacement)
        replacement.ready()
        assert again.wait(60) == 0, again.report()
        answer = json.loads(again.out[-1])
        assert answer["resumed_tokens"] > 10
        assert (answer["token_ids"], answer["text"]) == alone(model, PROMPT, LONG)
        assert answer["chain"][1] == {"peer": replacement.peer, "blocks": [2, 5]}
    finally:
        swarm[1].signal(signal.SIGCONT)
        end_all(started)
