"""Talking through a pipe and at a terminal: the words of transformers, Ctrl-C, repairs."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest

from tests.e2e.processes import (
    ENVIRONMENT,
    READY,
    SHOAL,
    START_TIMEOUT_S,
    Process,
    alone,
    run,
    servers,
    wait_until,
)

pytestmark = pytest.mark.e2e

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
STATS = re.compile(r"\[(\d+) tokens.*; (\d+) before them, (\d+) already there\]")


@pytest.fixture(scope="module")
def swarm(model, serve):
    """Three servers; the second one finds its place by itself."""
    (first,) = serve(model, ["0:3"])
    second = Process(
        "serve", str(model), "--num-blocks", "4", "--threads", "1", "--join", first.address
    )
    try:
        match = READY.fullmatch(second.wait_line(second.out, "ready "))
        assert match["blocks"] == "[3,7)"
        second.peer, second.address = match["peer"], match["address"]
        (spare,) = serve(model, ["3:7"], join=first.address)
        yield [first, second, spare]
    finally:
        second.end()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture
def command(model, swarm, template):
    join, greedy = ("--join", swarm[0].address), ("--temperature", "0")
    return ("chat", str(model), *join, "--template", str(template), *greedy, "--threads", "1")


def piped(command, text):
    return subprocess.run(
        [SHOAL, *command],
        input=text,
        capture_output=True,
        text=True,
        timeout=100,
        env={**ENVIRONMENT, "SHOAL_LOG": "warning"},
    )


def test_turns_say_what_transformers_says(model, command, tmp_path):
    saved = tmp_path / "chat.json"
    lines = ["The sea", "", f"/save {saved}", "and \\", "the sky", "/chain", "/undo", "/retry"]
    lines = [*lines, "/set max_new_tokens=5", "//x"]
    result = piped((*command, "--max-new-tokens", "20"), "\n".join(lines))
    assert result.returncode == 0, result.stderr
    first = alone(model, "[user]The sea[assistant]", 20)[1]
    history = f"[user]The sea[assistant]{first}"
    # The tokenizer knows no newlines: they are its unknown token.
    second = alone(model, f"{history}[user]and \nthe sky[assistant]", 20)[1]
    third = alone(model, f"{history}[user]/x[assistant]", 5)[1]
    assert result.stdout.splitlines() == [first, second, first, third]
    stats = [tuple(map(int, found.groups())) for found in STATS.finditer(result.stderr)]
    prompt = len("[user]The sea[assistant]")
    assert stats[0] == (20, prompt, 0)
    assert stats[1] == (20, prompt + 20 + len("[user]and \nthe sky[assistant]"), prompt + 19)
    assert stats[2] == (20, prompt, prompt - 1)
    assert f"positions, numerics {'same-class'}" in result.stderr or "exact" in result.stderr
    content = json.loads(saved.read_text())
    assert content["messages"] == [
        {"role": "user", "content": "The sea"},
        {"role": "assistant", "content": first},
    ]


def is_answering(swarm):
    before = servers(swarm[0].address)[swarm[0].peer]["iterations"]

    def is_running():
        return servers(swarm[0].address)[swarm[0].peer]["iterations"] > before + 5

    return is_running


def test_ctrl_c_stops_an_answer_and_a_repair_is_told(model, swarm, command):
    chat = Process(*command, "--max-new-tokens", "400", stdin=subprocess.PIPE)
    running = is_answering(swarm)
    chat.say("hello")
    wait_until(running, "an answer in progress", START_TIMEOUT_S)
    chat.signal(signal.SIGINT)
    stats = STATS.search(chat.wait_line(chat.err, "already there]"))
    assert "stopped" in stats[0]
    assert 5 < int(stats[1]) < 400

    # The server that answers dies: the chat goes on over its spare.
    chat.say("/reset")
    chat.say("more")
    (used,) = [one for one in swarm[1:] if servers(swarm[0].address)[one.peer]["sessions"]]
    wait_until(is_answering(swarm), "a second answer in progress")
    used.process.kill()
    line = chat.wait_line(chat.err, "[repaired")
    assert used.peer[:8] in line
    wait_until(lambda: sum("already there]" in line for line in chat.err) == 2, "an answer")
    chat.process.stdin.close()
    assert chat.wait() == 0, chat.report()
    assert len(chat.out) == 2
    chat.process.stdin = None
    chat.end()


class Terminal:
    """A `shoal chat` at a terminal of its own."""

    def __init__(self, *command, kind="dumb"):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [SHOAL, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": kind, "SHOAL_LOG": "warning"},
            start_new_session=True,
        )
        os.close(slave)
        self.text = ""

    def wait(self, text, timeout_s=START_TIMEOUT_S):
        """Read until `text` is there; returns what came before it, and forgets both."""
        deadline = time.monotonic() + timeout_s
        while text not in self.text:
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in time: {self.text!r}"
            self.text += os.read(self.master, 4096).decode()
        before, _, self.text = self.text.partition(text)
        return before

    def wait_more(self, count, timeout_s=START_TIMEOUT_S):
        """Until so many characters have come that nobody waited for."""
        deadline = time.monotonic() + timeout_s
        while len(self.text) < count:
            ready, _, _ = select.select([self.master], [], [], deadline - time.monotonic())
            assert ready, f"nothing new in time: {self.text!r}"
            self.text += os.read(self.master, 4096).decode()

    def type(self, text):
        os.write(self.master, text.encode())

    def interrupt(self):
        # A signal between the prompt and the wait for keys is seen with the next key only.
        wait_until(self.is_asleep, "a process that waits")
        self.process.send_signal(signal.SIGINT)

    def is_asleep(self):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(self.process.pid)], capture_output=True, text=True
        )
        return state.stdout.startswith(("S", "I"))

    def end(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(command):
    started = Terminal(*command, "--max-new-tokens", "400")
    yield started
    started.end()


def test_at_a_terminal_mistakes_do_not_end_it_and_the_second_ctrl_c_does(terminal):
    terminal.wait("> ")
    terminal.type("/rest\n")
    terminal.wait("did you mean /reset?")
    terminal.wait("> ")
    terminal.interrupt()
    terminal.wait("leaves)")
    terminal.wait("> ")
    terminal.type("hi\n")
    terminal.wait("hi\r\n")
    terminal.wait_more(20)
    terminal.interrupt()
    terminal.wait("stopped; first after")
    terminal.wait("> ")
    terminal.interrupt()
    terminal.wait("interrupted")
    assert terminal.process.wait(30) == 130


def test_watching_the_swarm(swarm):
    join = ("--join", swarm[0].address)
    shown = run("status", *join, "--count", "2", "--interval", "0.2", "--json")
    assert shown.returncode == 0, shown.stderr
    looks = [json.loads(line) for line in shown.stdout.splitlines()]
    assert len(looks) == 2
    assert looks[0]["at_s"] < looks[1]["at_s"]
    assert looks[0]["models"][0]["servers"]
    watching = Terminal("status", *join, "--watch", "--interval", "0.2", kind="xterm")
    try:
        watching.wait(swarm[0].peer[:8])
        watching.wait("q leaves")
        watching.type("q")
        assert watching.process.wait(30) == 0
    finally:
        watching.end()
