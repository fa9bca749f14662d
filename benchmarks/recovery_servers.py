"""Real `shoal serve` processes that may be killed and are back within a second or two.

`python recovery_servers.py` imports everything once; each line on stdin is then a server to
fork (JSON), each line on stdout its process id. The end of stdin kills them all. A forked
process runs the command line of `shoal serve` and nothing else, but a thread beside it
answers questions on a Unix socket: what the server holds, and orders that no server takes
from anybody else (drop all sessions with their links, give up logs at once). It finds the
server through the garbage collector, so that `shoal` needs no hook.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from workers import environment

READY: Final = re.compile(r"^ready peer=(\S+) address=(\S+)", re.MULTILINE)
START_S_MAX: Final = 60.0
POLL_S: Final = 0.02
PREPARED: Final = ("shoal.cli.app", "shoal.cli.serve", "shoal.cli.serving")
"""What takes seconds to import, done once before any fork."""

ORDER_S_MAX: Final = 5.0
"""How long an order may take; a stopped process answers nothing."""


# --- in the forked process ---------------------------------------------------------------


def _found(kind: type[Any], is_wanted: Callable[[Any], bool]) -> Any:
    found = [one for one in gc.get_objects() if isinstance(one, kind) and is_wanted(one)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} objects of {kind.__name__}")
    return found[0]


def holdings(server: Any) -> dict[str, Any]:
    """What a server holds now: nothing of it may be left when all clients are gone."""
    ledger = server.sessions.ledger
    hops = list(server.sessions)
    return {
        "hops": len(hops),
        "links": server.num_links,
        "cache_tokens_in_use": (ledger.total - ledger.free) * ledger.page_tokens,
        "log_bytes": sum(hop.log.num_bytes for hop in hops),
        "tasks": len(asyncio.all_tasks()),
        "objects": len(gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0,
        "iterations": server.engine.iteration,
    }


def drop_everything(server: Any) -> dict[str, Any]:
    """As if the process had died, but it is back at once: sessions are gone, streams break."""
    hops = list(server.sessions)
    for hop in hops:
        server._forget(hop)
    for end in (*server._controls.values(), *server._receivers.values()):
        end.close()
    return {"dropped": len(hops)}


def trim_logs_at_once(server: Any) -> dict[str, Any]:
    """From now on logs forget rows as soon as they were sent: no repair is possible."""

    def trim() -> None:
        for hop in server.sessions:
            hop.log.trim(hop.outbound.cursor)

    server.sessions.bound_logs = trim
    return {}


ORDERS: Final = {"holdings": holdings, "drop": drop_everything, "trim": trim_logs_at_once}


def _obey(order: str) -> Any:
    """Run an order in the server's event loop."""
    from shoal.server.server import Server

    server = _found(Server, lambda _: True)
    loop = _found(asyncio.AbstractEventLoop, lambda one: one.is_running())
    done: list[Any] = []
    is_done = threading.Event()

    def work() -> None:
        done.append(ORDERS[order](server))
        is_done.set()

    loop.call_soon_threadsafe(work)
    if not is_done.wait(ORDER_S_MAX):
        raise TimeoutError(f"{order}: the event loop stands still")
    return done[0]


def _answer_orders(listening: socket.socket, parent: int) -> None:
    listening.settimeout(1.0)
    while True:
        if os.getppid() != parent:
            os._exit(1)  # nobody is there any more to end us
        try:
            talking, _ = listening.accept()
        except TimeoutError:
            continue
        with talking, talking.makefile("rw", encoding="utf-8") as lines:
            try:
                answer: Any = _obey(lines.readline().strip())
            except (LookupError, TimeoutError) as error:
                answer = {"error": str(error)}
            lines.write(json.dumps(answer) + "\n")


def _be_a_server(request: dict[str, Any], parent: int) -> None:
    """In the forked process; does not return."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    out = os.open(request["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(request["socket"])
    listening.listen()
    threading.Thread(target=_answer_orders, args=(listening, parent), daemon=True).start()
    from shoal.cli.app import run

    code = 1
    try:
        code = run(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def spawn_forever() -> None:
    """The forking process: one server per line on stdin."""
    from shoal.cli.models import quiet_transformers

    quiet_transformers()
    for name in PREPARED:
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark says when it is over
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    gc.freeze()
    parent, children = os.getpid(), []
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _be_a_server(json.loads(line), parent)
        children.append(child)
        print(child, flush=True)
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


# --- in the benchmark --------------------------------------------------------------------


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
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return

    @property
    def is_alive(self) -> bool:
        """Whether the process exists (stopped counts)."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    async def wait_gone(self, timeout_s: float) -> bool:
        """Whether it ended within this time."""
        deadline_s = time.monotonic() + timeout_s
        while self.is_alive:
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(POLL_S)
        return True

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


class Fleet:
    """The servers of one swarm. Made by `fleet`."""

    def __init__(self, spawner: subprocess.Popen[str], folder: Path, common: list[str]) -> None:
        self._spawner = spawner
        self._folder = folder
        self._common = common
        self._count = 0
        self._lock = asyncio.Lock()
        self.members: dict[str, Member] = {}
        """The last process of each name."""

    async def start(self, name: str, blocks: str) -> Member:
        """Start (or start again, as the same peer) the server of this name.

        Raises:
            SystemExit: it did not start; with what it said.
        """
        async with self._lock:
            self._count += 1
            stem = f"{name}-{self._count}"
            join = next((m.address for m in self.members.values() if m.name != name), None)
            started_s = time.monotonic()
            arguments = [*self._common, "--blocks", blocks]
            arguments += ["--identity", str(self._folder / f"{name}.key")]
            arguments += ["--join", join] if join else []
            output, address = self._folder / f"{stem}.log", self._folder / f"{stem}.sock"
            request = {"arguments": arguments, "output": str(output), "socket": str(address)}
            pid = await asyncio.to_thread(self._fork, json.dumps(request))
        while (match := READY.search(_text(output))) is None:
            if time.monotonic() - started_s > START_S_MAX or not _exists(pid):
                raise SystemExit(f"server {name} did not start: {_text(output)[-2000:]}")
            await asyncio.sleep(POLL_S)
        member = Member(
            name=name, blocks=blocks, pid=pid, peer=match[1], address=match[2], socket=address,
            started_s=started_s, ready_s=time.monotonic(),
        )  # fmt: skip
        self.members[name] = member
        return member

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


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def fleet(folder: Path, model: str, *options: str) -> Iterator[Fleet]:
    """An empty fleet whose servers run with one thread; all end with it.

    `folder` takes their keys, logs and sockets; `options` go to `shoal serve`.
    """
    spawner = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(1) | {"SHOAL_LOG": os.environ.get("SHOAL_LOG", "info")},
    )  # fmt: skip
    try:
        if spawner.stdout is None or not spawner.stdout.readline():
            raise SystemExit("the forking process did not start")
        yield Fleet(spawner, folder, ["serve", model, "--threads", "1", *options])
    finally:
        spawner.communicate()


if __name__ == "__main__":
    spawn_forever()
