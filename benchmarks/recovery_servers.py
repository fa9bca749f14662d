"""Real `shoal serve` processes that may be killed and are back within a second or two.

They are forked by `recovery_spawner.py`, which imported everything before; a server that is
started again is the same peer at the same port, as a service that its machine restarts.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from recovery_spawner import ORDER_S_MAX
from workers import HERE, environment

READY: Final = re.compile(r"^ready peer=(\S+) address=(\S+)", re.MULTILINE)
SERVE: Final = "shoal.cli.app:run"
PORT_MIN: Final = 20_000
PORT_END: Final = 30_000
START_S_MAX: Final = 60.0
POLL_S: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One running server."""

    name: str
    blocks: str
    pid: int
    peer: str
    """As text."""
    address: str
    socket: Path
    started_s: float
    """Monotonic time at which it was asked to start."""
    ready_s: float

    def signal(self, number: int) -> None:
        """Send it a signal; no error when it is gone."""
        send_signal(self.pid, number)

    async def wait_gone(self, timeout_s: float) -> bool:
        """Whether it ended within this time."""
        return await wait_gone(self.pid, timeout_s)

    async def order(self, order: str) -> dict[str, Any]:
        """Have it do or tell something.

        Raises:
            OSError, TimeoutError: it is gone, or stopped.
        """
        async with asyncio.timeout(ORDER_S_MAX + 1.0):
            reader, writer = await asyncio.open_unix_connection(self.socket)
            try:
                writer.write(order.encode() + b"\n")
                answer = json.loads(await reader.readline() or "{}")
            finally:
                writer.close()
        if not isinstance(answer, dict) or "error" in answer:
            raise OSError(f"{self.name}: {answer}")
        return answer

    def resident_bytes(self) -> int:
        """Memory of its own (without what all forked processes share); 0: not known."""
        try:
            text = Path(f"/proc/{self.pid}/smaps_rollup").read_text(encoding="ascii")
        except OSError:
            return 0
        private = re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", text, re.MULTILINE)
        return 1024 * sum(map(int, private))


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A forked process."""

    pid: int
    output: Path
    """What it prints."""
    socket: Path
    """Where its thread takes orders."""

    def said(self) -> str:
        """Everything that it printed so far."""
        return _text(self.output)


class NotStarted(Exception):
    """A server ended before it was ready, or took too long."""


class Fleet:
    """The servers of one swarm. Made by `fleet`."""

    def __init__(self, spawner: subprocess.Popen[str], folder: Path, common: list[str]) -> None:
        self._spawner = spawner
        self._folder = folder
        self._common = common
        self._count = 0
        self._ports: dict[str, int] = {}
        self._lock = asyncio.Lock()
        self.members: dict[str, Member] = {}
        """The last process of each name."""

    async def start(self, name: str, blocks: str) -> Member:
        """Start (or start again, as the same peer at the same port) the server of this name.

        Raises:
            NotStarted: it did not; with what it said.
        """
        started_s = time.monotonic()
        port = self._ports.setdefault(name, _free_port())
        arguments = [*self._common, "--blocks", blocks, "--listen", f"tcp://127.0.0.1:{port}"]
        arguments += ["--identity", str(self._folder / f"{name}.key")]
        for member in self.members.values():
            arguments += ["--join", member.address] if member.name != name else []
        child = await self.fork(name, SERVE, arguments)
        while (match := READY.search(child.said())) is None:
            if time.monotonic() - started_s > START_S_MAX or not exists(child.pid):
                raise NotStarted(f"server {name} did not start: {child.said()[-2000:]}")
            await asyncio.sleep(POLL_S)
        member = Member(
            name=name, blocks=blocks, pid=child.pid, peer=match[1], address=match[2],
            socket=child.socket, started_s=started_s, ready_s=time.monotonic(),
        )  # fmt: skip
        self.members[name] = member
        return member

    async def fork(self, name: str, program: str, arguments: list[str]) -> Child:
        """A process that runs `MODULE:FUNCTION` with these arguments."""
        async with self._lock:
            self._count += 1
            stem = self._folder / f"{name}-{self._count}"
            child = Child(pid=0, output=Path(f"{stem}.log"), socket=Path(f"{stem}.sock"))
            request = {
                "program": program, "arguments": arguments, "output": str(child.output),
                "socket": str(child.socket),
            }  # fmt: skip
            return replace(child, pid=await asyncio.to_thread(self._fork, json.dumps(request)))

    def _fork(self, request: str) -> int:
        if self._spawner.stdin is None or self._spawner.stdout is None:
            raise SystemExit("the forking process has no pipes")
        self._spawner.stdin.write(request + "\n")
        self._spawner.stdin.flush()
        return int(self._spawner.stdout.readline())

    @property
    def joins(self) -> list[str]:
        """Addresses of everybody."""
        return [member.address for member in self.members.values()]

    def named(self, peer: str) -> Member:
        """The member with this peer id (text)."""
        return next(member for member in self.members.values() if member.peer == peer)

    def said(self, pattern: str) -> list[str]:
        """Lines of all logs so far that match."""
        lines = (line for path in sorted(self._folder.glob("*.log")) for line in _lines(path))
        return [line for line in lines if re.search(pattern, line)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _lines(path: Path) -> list[str]:
    return [f"{path.stem}: {line}" for line in _text(path).splitlines()]


def exists(pid: int) -> bool:
    """Whether there is such a process (stopped counts)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def wait_gone(pid: int, timeout_s: float) -> bool:
    """Whether the process ended within this time."""
    deadline_s = time.monotonic() + timeout_s
    while exists(pid):
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(POLL_S)
    return True


def send_signal(pid: int, number: int) -> None:
    """Send a signal; no error when the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _free_port() -> int:
    """Outside the range that outgoing connections use: it must be free after a kill too."""
    rng = random.SystemRandom()
    while True:
        port = rng.randrange(PORT_MIN, PORT_END)
        with socket.socket() as trying:
            try:
                trying.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@contextmanager
def fleet(folder: Path, model: str, *options: str, programs: Sequence[str] = ()) -> Iterator[Fleet]:
    """An empty fleet whose servers run with one thread; all end with it.

    `folder` takes their keys, logs and sockets; `options` go to `shoal serve`; `programs` are
    modules of ours that will be forked too.
    """
    spawner = subprocess.Popen(
        [sys.executable, str(HERE / "recovery_spawner.py"), *programs],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(1) | {"SHOAL_LOG": os.environ.get("SHOAL_LOG", "info")},
    )  # fmt: skip
    try:
        if spawner.stdout is None or not spawner.stdout.readline():
            raise SystemExit("the forking process did not start")
        yield Fleet(spawner, folder, ["serve", model, "--threads", "1", *options])
    finally:
        spawner.communicate()
