"""Real `shoal` processes on loopback, and waiting for them without sleeping blindly."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.cli.joining import SwarmChoice
from shoal.cli.status import as_dicts, look

SHOAL = str(Path(sys.executable).with_name("shoal"))
READY = re.compile(r"ready peer=(?P<peer>\S+) address=(?P<address>\S+) blocks=(?P<blocks>\S+)\n")
START_TIMEOUT_S = 60.0
"""Importing torch and loading takes seconds, several times that when all cores are busy."""

STOP_TIMEOUT_S = 20.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "SHOAL_LOG": "info"}


class Running(Protocol):
    """What is used of a `subprocess.Popen`."""

    stdin: IO[str] | None
    stdout: IO[str] | None
    stderr: IO[str] | None

    def poll(self) -> int | None: ...
    def send_signal(self, number: int) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


Launch = Callable[[Sequence[str]], Running]
"""Starts a `shoal` with these arguments."""


def popen(
    arguments: Sequence[str],
    stdin: int = subprocess.DEVNULL,
    enter: Callable[[], None] | None = None,
) -> subprocess.Popen[str]:
    """A `shoal` that a shell might have started; it calls `enter` before it begins."""
    return subprocess.Popen(
        [SHOAL, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=ENVIRONMENT,
        preexec_fn=enter,
        start_new_session=True,
    )


class Process:
    """A running `shoal`; stdout and stderr are read all the time."""

    def __init__(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, launch: Launch | None = None
    ) -> None:
        self.arguments = arguments
        self.process = launch(arguments) if launch else popen(arguments, stdin)
        self._is_stopped = False
        self.out: list[str] = []
        self.err: list[str] = []
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, lines: list[str]) -> None:
        for line in stream:
            lines.append(line)
            self._news.put(None)
        self._news.put(None)

    def wait_line(self, lines: list[str], text: str, timeout_s: float = START_TIMEOUT_S) -> str:
        """The first line with `text` in it, as soon as it is there."""
        deadline = time.monotonic() + timeout_s
        while True:
            for line in list(lines):
                if text in line:
                    return line
            if not any(reader.is_alive() for reader in self._readers):
                raise AssertionError(f"ended without {text!r}: {self.report()}")
            try:
                self._news.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {text!r} in time: {self.report()}") from None

    def say(self, line: str) -> None:
        """Write a line to its stdin (a pipe)."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal; no error when the process is gone."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def stop(self) -> None:
        """Ask it to end, once: a second signal would cut its good-bye short."""
        if not self._is_stopped:
            self._is_stopped = True
            self.signal(signal.SIGTERM)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code, with all output read."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        return code

    def end(self) -> None:
        """Make sure that it is gone."""
        self.stop()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def report(self) -> str:
        """What it said, for a failing test."""
        return f"{self.arguments} out={self.out} err={''.join(self.err[-30:])}"


class Server(Process):
    """A `shoal serve` process."""

    def __init__(
        self,
        model: Path,
        blocks: str,
        *extra: str,
        join: str | None = None,
        launch: Launch | None = None,
    ) -> None:
        joins = ["--join", join] if join else []
        command = ["serve", str(model), "--blocks", blocks, "--threads", "1", *joins, *extra]
        super().__init__(*command, launch=launch)
        self.peer = self.address = ""

    def ready(self) -> Server:
        """Wait for the ready line."""
        match = READY.fullmatch(self.wait_line(self.out, "ready "))
        assert match, self.out
        self.peer, self.address = match["peer"], match["address"]
        return self


def end_all(processes: list[Process]) -> None:
    """End them together: each takes a moment to say good-bye."""
    for process in processes:
        process.stop()
    for process in processes:
        process.end()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A `shoal` command to its end."""
    return subprocess.run(
        [SHOAL, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        env=ENVIRONMENT,
    )


def generate(model: Path, join: str, prompt: str, *extra: str) -> dict:
    """The JSON of a `shoal generate` that must succeed."""
    command = ("generate", str(model), "--join", join, "--prompt", prompt, "--json", *extra)
    result = run(*command)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def servers(join: str) -> dict[str, dict]:
    """The swarm's servers by peer, asked now, in this process."""
    models = as_dicts(asyncio.run(look(SwarmChoice.parse([join], None, None))))
    return {server["peer"]: server for model in models for server in model["servers"]}


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Ask again and again until it is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"


def error_line(text: str) -> str:
    """The one `error:` line on stderr; there must be no traceback."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    return lines[0]


def alone(folder: Path, prompt: str, num_tokens: int) -> tuple[list[int], str]:
    """What transformers says in this process, greedy in float32: ids and text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = model.generate(ids, max_new_tokens=num_tokens, do_sample=False)
    new = whole[0, ids.shape[1] :].tolist()
    return new, tokenizer.decode(new, skip_special_tokens=True)
