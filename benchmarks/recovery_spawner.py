"""The process that forks killable servers, and what runs beside each of them.

`python recovery_spawner.py [MODULE ...]` imports everything once; each line on stdin is then a
process to fork (JSON), each line on stdout its process id. The end of stdin kills them all. A
server runs the command line of `shoal serve` and nothing else, but a thread beside it answers
questions on a Unix socket: what the server holds, and orders that no server takes from
anybody else (drop all sessions with their links, give up logs at once). It finds the server
through the garbage collector, so that `shoal` needs no hook.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import json
import os
import re
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

ORDER_S_MAX: Final = 5.0
"""How long an order may take; a stopped process answers nothing."""


def _found(kind: type[Any], is_wanted: Callable[[Any], bool]) -> Any:
    found = [one for one in gc.get_objects() if isinstance(one, kind) and is_wanted(one)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} objects of {kind.__name__}")
    return found[0]


def holdings(server: Any) -> dict[str, Any]:
    """What a server holds now: nothing of it may be left when all clients are gone."""
    ledger = server.sessions.ledger
    hops, tasks = list(server.sessions), asyncio.all_tasks()
    return {
        "hops": len(hops),
        "links": server.num_links,
        "cache_tokens_in_use": (ledger.total - ledger.free) * ledger.page_tokens,
        "log_bytes": sum(hop.log.num_bytes for hop in hops),
        "tasks": len(tasks),
        "task_names": Counter(re.sub(r"[0-9a-f]{6,}|[0-9]+", "*", one.get_name()) for one in tasks),
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


def trim_logs(server: Any) -> dict[str, Any]:
    """From now on logs forget rows as soon as they were sent: no repair is possible."""

    def trim() -> None:
        for hop in server.sessions:
            hop.log.trim(hop.outbound.cursor)

    server.sessions.bound_logs = trim
    return {}


def keep_logs(server: Any) -> dict[str, Any]:
    """As usual again."""
    vars(server.sessions).pop("bound_logs", None)
    return {}


def release_memory(_: Any) -> dict[str, Any]:
    """Give back what the allocator keeps though nobody uses it; what stays is in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return {"is_released": bool(trim and trim(0))}


ORDERS: Final = {
    "release memory": release_memory,
    "holdings": holdings,
    "drop": drop_everything,
    "trim logs": trim_logs,
    "keep logs": keep_logs,
}


@cache
def _server_and_loop() -> tuple[Any, asyncio.AbstractEventLoop]:
    from shoal.server.server import Server

    server = _found(Server, lambda _: True)
    return server, _found(asyncio.AbstractEventLoop, lambda one: one.is_running())


def _obey(order: str) -> Any:
    """Run an order in the server's event loop."""
    server, loop = _server_and_loop()
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


def _be(request: dict[str, Any], parent: int) -> None:
    """In the forked process: run the program that is wanted; does not return."""
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
    module, name = request["program"].split(":")
    code = 1
    try:
        code = getattr(importlib.import_module(module), name)(request["arguments"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def spawn_forever() -> None:
    """The forking process: one process per line on stdin."""
    from shoal.cli.app import COMMANDS
    from shoal.cli.models import quiet_transformers

    quiet_transformers()
    commands = [f"shoal.cli.{name}" for name in COMMANDS]
    for name in (*commands, "shoal.cli.serving", *sys.argv[1:]):
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the benchmark says when it is over
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    gc.freeze()
    parent, children = os.getpid(), []
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _be(json.loads(line), parent)
        children.append(child)
        print(child, flush=True)
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    spawn_forever()
