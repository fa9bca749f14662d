"""Starts `shoal` processes quickly: forks them from one that has imported everything.

A process that starts by itself imports torch for three seconds, and these tests kill many.
What is forked runs the same command with the same arguments, in a session of its own, and
can be killed, stopped and cut off like any other.

`python -m tests.e2e.nursery FD` serves requests on a Unix socket: JSON arguments, and the
descriptors of stdout, stderr and perhaps a network namespace; answered by the child's pidfd.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.e2e.processes import ENVIRONMENT, Launch, popen

REQUEST_BYTES_MAX = 1 << 16
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
"""What is forked dies with the nursery, and that with the tests, however they end."""

IMPORTS = ("shoal.cli.app", "shoal.cli.serve", "shoal.cli.serving", "shoal.cli.models")


def enter_network(namespace: int) -> None:
    """Move this thread into a network namespace; needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Nursery:
    """Forks `shoal` processes. A context manager; elsewhere than on Linux it just starts them."""

    def __enter__(self) -> Nursery:
        self._socket: socket.socket | None = None
        if hasattr(os, "pidfd_open"):
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.nursery", str(theirs.fileno())],
                cwd=Path(__file__).parents[2],
                env=ENVIRONMENT,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._socket is not None:
            self._socket.close()
            self._process.wait()

    def launch(self, namespace: int | None = None) -> Launch:
        """Starts a process, in this network namespace if one is given."""
        return popen if self._socket is None else partial(self._fork, namespace)

    def _fork(self, namespace: int | None, arguments: Sequence[str]) -> Forked:
        assert self._socket is not None
        pipes = [os.pipe(), os.pipe()]
        theirs = [write for _, write in pipes]
        extra = [] if namespace is None else [namespace]
        socket.send_fds(self._socket, [json.dumps(list(arguments)).encode()], [*theirs, *extra])
        for fd in theirs:
            os.close(fd)
        answer, (pidfd,), _, _ = socket.recv_fds(self._socket, 64, 1)
        return Forked(int(answer), pidfd, pipes[0][0], pipes[1][0])


class Forked:
    """A forked process, used like a `subprocess.Popen`."""

    def __init__(self, pid: int, pidfd: int, out: int, err: int) -> None:
        self.pid = pid
        self.stdin = None
        self.stdout = os.fdopen(out, "r", buffering=1)
        self.stderr = os.fdopen(err, "r", buffering=1)
        self._pidfd = pidfd
        self._is_over = False

    def poll(self) -> int | None:
        """0 once it is over, however it ended."""
        return 0 if self._is_gone(0) else None

    def send_signal(self, number: int) -> None:
        if not self._is_gone(0):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout: float | None = None) -> int:
        if not self._is_gone(timeout):
            raise subprocess.TimeoutExpired(["shoal"], timeout or 0)
        return 0

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _is_gone(self, timeout: float | None) -> bool:
        if not self._is_over:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            self._is_over = bool(poller.poll(None if timeout is None else timeout * 1000))
            if self._is_over:
                os.close(self._pidfd)
        return self._is_over


def serve(requests: socket.socket) -> None:
    """Fork what is asked for until the other side closes the socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks for exit codes
    while True:
        message, fds, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 3)
        if not message:
            return
        pid = os.fork()
        if not pid:
            requests.close()
            become(json.loads(message), *fds)
        pidfd = os.pidfd_open(pid)
        socket.send_fds(requests, [str(pid).encode()], [pidfd])
        for fd in (*fds, pidfd):
            os.close(fd)


def become(arguments: list[str], out: int, err: int, namespace: int | None = None) -> None:
    """Be that process: never returns."""
    code: object = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if namespace is not None:
            enter_network(namespace)
            os.close(namespace)
        for fd, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
        sys.argv = ["shoal", *arguments]
        importlib.import_module("shoal.cli.main").main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 - the interpreter would print it as well
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    serve(socket.socket(fileno=int(sys.argv[1])))
