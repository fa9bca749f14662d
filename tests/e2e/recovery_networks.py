"""Network namespaces joined by a router that can drop what goes from one to another.

Needs root and iproute2. Packets vanish silently, as behind a broken cable; nothing is
refused. All of it is gone when its processes are.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tests.e2e.nursery import enter_network
from tests.e2e.processes import wait_until

T = TypeVar("T")


def missing() -> str:
    """What networks need and this machine lacks; empty if nothing."""
    if not hasattr(os, "geteuid") or os.geteuid():
        return "network namespaces are made by root"
    lacking = [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]
    return f"no {', '.join(lacking)} here" if lacking else ""


class Networks:
    """A router's namespace, where clients live, and one for each name. A context manager."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._holders: list[subprocess.Popen[bytes]] = []
        self._cuts: set[tuple[str, str]] = set()

    def __enter__(self) -> Networks:
        self._router = self._hold()
        self._ip(self._router, "link", "set", "lo", "up")
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        subprocess.run([*_inside(self._router), "sh", "-c", forward], check=True)
        self._pids = {name: self._hold() for name in self._names}
        for index, name in enumerate(self._names, start=1):
            pid, link = self._pids[name], f"v{index}"
            self._ip(self._router, "link", "add", link, "type", "veth", "peer", "name", "eth0",
                     "netns", str(pid))  # fmt: skip
            self._ip(self._router, "addr", "add", f"10.77.{index}.1/24", "dev", link)
            self._ip(self._router, "link", "set", link, "up")
            self._ip(pid, "addr", "add", f"{self.host(name)}/24", "dev", "eth0")
            self._ip(pid, "link", "set", "eth0", "up")
            self._ip(pid, "link", "set", "lo", "up")
            self._ip(pid, "route", "add", "default", "via", f"10.77.{index}.1")
        self._fds = {name: self._open(pid) for name, pid in self._pids.items()}
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def host(self, name: str) -> str:
        """The address of a namespace."""
        return f"10.77.{self._names.index(name) + 1}.2"

    def namespace(self, name: str) -> int:
        """Its descriptor."""
        return self._fds[name]

    def cut(self, name: str, others: Sequence[str]) -> None:
        """Nothing passes between a namespace and these others any more, in either direction."""
        for other in others:
            for pair in itertools.permutations((name, other)):
                self._rule("add", *pair)
                self._cuts.add(pair)

    def shape(self, rate: str) -> None:
        """Let each namespace send and receive at this rate (`50mbit`) and no faster."""
        for index, name in enumerate(self._names, start=1):
            for pid, device in ((self._pids[name], "eth0"), (self._router, f"v{index}")):
                bucket = ["tbf", "rate", rate, "burst", "16kb", "latency", "400ms"]
                command = [*_inside(pid), "tc", "qdisc", "add", "dev", device, "root", *bucket]
                subprocess.run(command, check=True, timeout=10)

    def sent_bytes(self, name: str) -> int:
        """What a namespace has sent over its shaped link."""
        command = [*self.inside(name), "tc", "-s", "-j", "qdisc", "show", "dev", "eth0"]
        said = subprocess.run(command, check=True, timeout=10, capture_output=True, text=True)
        return int(json.loads(said.stdout)[0]["bytes"])

    def inside(self, name: str) -> list[str]:
        """What to put before a command that is to run in a namespace."""
        return _inside(self._pids[name])

    def isolate(self, name: str) -> None:
        """Nothing reaches or leaves a namespace, from clients neither."""
        self.cut(name, [other for other in self._names if other != name])
        self._ip(self._router, "link", "set", self._link(name), "down")

    def heal(self) -> None:
        """Everybody reaches everybody again."""
        for pair in self._cuts:
            self._rule("del", *pair)
        self._cuts.clear()
        for name in self._names:
            self._ip(self._router, "link", "set", self._link(name), "up")

    def run(self, work: Callable[[], T]) -> T:
        """Call it on a thread of its own in the router's namespace."""
        results: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            fd = self._open(self._router)
            try:
                enter_network(fd)
                results.append(work())
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                errors.append(error)
            finally:
                os.close(fd)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def _link(self, name: str) -> str:
        return f"v{self._names.index(name) + 1}"

    def _rule(self, what: str, sender: str, receiver: str) -> None:
        self._ip(self._router, "rule", what, "from", self.host(sender), "to", self.host(receiver),
                 "blackhole")  # fmt: skip

    def _hold(self) -> int:
        """A new namespace; the process that keeps it."""
        holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        self._holders.append(holder)
        ours = os.stat("/proc/self/ns/net").st_ino
        path = Path(f"/proc/{holder.pid}/ns/net")
        wait_until(lambda: path.stat().st_ino != ours, "a network namespace")
        return holder.pid

    @staticmethod
    def _open(pid: int) -> int:
        return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)

    @staticmethod
    def _ip(pid: int, *arguments: str) -> None:
        subprocess.run([*_inside(pid), "ip", *arguments], check=True, timeout=10)


def _inside(pid: int) -> list[str]:
    return ["nsenter", "-t", str(pid), "-n"]
