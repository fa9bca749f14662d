"""Machines in one local network: network namespaces on one bridge, which carries multicasts."""

from __future__ import annotations

from tests.e2e.recovery_networks import Networks


class LocalNetwork(Networks):
    """A bridge's namespace and one for each name, all in 10.78.0.0/24. A context manager."""

    def __enter__(self) -> LocalNetwork:
        self._router = self._hold()
        self._ip(self._router, "link", "add", "bridge", "type", "bridge", "mcast_snooping", "0")
        self._ip(self._router, "link", "set", "bridge", "up")
        self._pids = {name: self._hold() for name in self._names}
        for index, (name, pid) in enumerate(self._pids.items(), start=1):
            link = f"v{index}"
            self._ip(self._router, "link", "add", link, "type", "veth", "peer", "name", "eth0",
                     "netns", str(pid))  # fmt: skip
            self._ip(self._router, "link", "set", link, "master", "bridge", "up")
            self._ip(pid, "addr", "add", f"{self.host(name)}/24", "dev", "eth0")
            self._ip(pid, "link", "set", "eth0", "up")
            self._ip(pid, "link", "set", "lo", "up")
            self._ip(pid, "route", "add", "default", "dev", "eth0")
        self._fds = {name: self._open(pid) for name, pid in self._pids.items()}
        return self

    def host(self, name: str) -> str:
        """The address of a namespace."""
        return f"10.78.0.{self._names.index(name) + 1}"
