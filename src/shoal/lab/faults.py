"""What goes wrong in a simulated swarm, by name: how each fault begins, and how it ends."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.base.ids import PeerId
from shoal.client.client import Client
from shoal.lab.network import SimulatedNetwork
from shoal.lab.swarm import SimulatedServer, SimulatedSwarm

FaultKind = Literal[
    "crash", "vanish", "restart", "neighbours", "all", "freeze", "hang", "slow", "cut",
    "black_hole", "partition", "client_offline", "no_dialing", "bad_batch", "poison", "evict",
    "trim", "drain",
]  # fmt: skip

Undo = Callable[[], Awaitable[None]]
"""Ends a fault."""

BAD_SHARE = 0.3
"""Part of the calls that fail or lie while a fault of the engine lasts."""

SLOWNESS = 20.0
"""How many times as long an iteration of a slow server takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault: `kind` at `at_s` for `lasts_s`, at server `target` (towards `other`)."""

    kind: FaultKind
    at_s: float
    lasts_s: float
    target: int
    other: int

    def __str__(self) -> str:
        return (
            f"{self.at_s:6.2f} s  {self.kind} server {self.target} (other {self.other}) "
            f"for {self.lasts_s:.2f} s"
        )


class Injector:
    """Begins faults in one swarm."""

    def __init__(
        self,
        swarm: SimulatedSwarm,
        network: SimulatedNetwork,
        clients: Sequence[Client],
        rng: random.Random,
    ) -> None:
        self._swarm = swarm
        self._network = network
        self._clients = clients
        self._rng = rng

    async def begin(self, fault: Fault) -> Undo:
        """Let it happen; the result ends it."""
        server = self._swarm.servers[fault.target]
        other = self._swarm.servers[fault.other]
        match fault.kind:
            case "crash":
                return await self._end([server], 0.0)
            case "vanish":
                return await self._end([server], None)
            case "neighbours":
                return await self._end([server, *self._neighbours(server, other)], 0.0)
            case "all":
                return await self._end(self._swarm.servers, 0.0)
            case "restart":
                if server.is_up:
                    await (await self._end([server], None))()
                return _nothing
            case "evict":
                if server.server is not None:
                    server.server.evict_all()
                return _nothing
            case "trim":
                _trim(server)
                return _nothing
            case "drain":
                return await self._drain(server, fault.lasts_s)
            case "freeze" | "cut" | "black_hole" | "no_dialing" | "partition" | "client_offline":
                return self._disturb(fault, server.peer, other.peer)
            case "hang" | "slow" | "bad_batch" | "poison":
                return self._impair(fault, server)

    async def _end(self, servers: Iterable[SimulatedServer], detect_after_s: float | None) -> Undo:
        """The processes end; undone, they are there again, with nothing in their caches."""
        ended = list(servers)
        for server in ended:
            await server.crash(detect_after_s)

        async def undo() -> None:
            for server in ended:
                if not server.is_up:
                    await server.start()

        return undo

    async def _drain(self, server: SimulatedServer, within_s: float) -> Undo:
        """Sessions are asked to go; undone, the process ends and a new one starts."""
        if server.server is None:
            return _nothing
        draining = asyncio.ensure_future(server.server.drain(within_s))

        async def undo() -> None:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
            await server.crash(0.0)
            await server.start()

        return undo

    def _neighbours(self, server: SimulatedServer, other: SimulatedServer) -> list[SimulatedServer]:
        """A server whose blocks adjoin: `other` if it does, or the first that does."""
        span = server.spec.span
        adjoining = [
            one
            for one in (other, *self._swarm.servers)
            if one.spec.span.start == span.end or one.spec.span.end == span.start
        ]
        return adjoining[:1]

    def _disturb(self, fault: Fault, peer: PeerId, other: PeerId) -> Undo:
        network, pair = self._network, (peer, other)
        match fault.kind:
            case "freeze":
                network.freeze(peer)
                return _call(network.thaw, peer)
            case "cut":
                network.cut(*pair)
            case "black_hole":
                network.black_hole(*pair)
            case "no_dialing":
                network.forbid_dialing(*pair)
            case "partition":
                network.partition(self._part(peer))
                return _call(network.partition)
            case _:
                network.partition({client.me for client in self._clients[:1]})
                return _call(network.partition)
        return _call(network.mend, *pair)

    def _impair(self, fault: Fault, server: SimulatedServer) -> Undo:
        match fault.kind:
            case "hang":
                server.hang()
                return _call(server.unhang)
            case "slow":
                server.slowness = SLOWNESS
                return _call(setattr, server, "slowness", 1.0)
            case "bad_batch":
                server.fault = lambda call: "raise" if self._rng.random() < BAD_SHARE else None
                server.training_fault = lambda *_: "raise" if self._is_bad() else None
            case _:
                server.fault = lambda call: "poison" if self._rng.random() < BAD_SHARE else None
                server.training_fault = lambda *_: "poison" if self._is_bad() else None

        async def undo() -> None:
            server.fault = server.training_fault = None

        return undo

    def _is_bad(self) -> bool:
        return self._rng.random() < BAD_SHARE

    def _part(self, peer: PeerId) -> set[PeerId]:
        others = [one.peer for one in self._swarm.servers if one.peer != peer]
        return {peer, *self._rng.sample(others, len(others) // 2)}


def _trim(server: SimulatedServer) -> None:
    """All logs lose what they may lose, as under memory pressure."""
    if server.server is not None:
        for hop in server.server.sessions:
            hop.log.trim(hop.outbound.acked)


async def _nothing() -> None:
    return None


def _call(function: Callable[..., object], *args: object) -> Undo:
    async def call() -> None:
        function(*args)

    return call
