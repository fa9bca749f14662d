"""An incident again: the real code on virtual time, with what the traces say as the schedule.

Servers come and go as they did, sessions send their rows when they did, with made-up contents
that toy blocks check. The replay records itself, so that both can be compared.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.base.ids import short
from shoal.base.spans import Span
from shoal.client.client import Client
from shoal.client.tending import TendConfig
from shoal.lab.chaos import first_error
from shoal.lab.clock import run_virtual
from shoal.lab.invariants import check_end, check_step
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.lab.script import Reference
from shoal.lab.swarm import SWARM, ServerSpec, SimulatedServer, SimulatedSwarm
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.lab.trace_fates import Disturbance
from shoal.lab.trace_guide import Guide, GuidedDirectory
from shoal.lab.trace_incident import find_incident
from shoal.lab.trace_past import Incident, ServerPast, SessionPast
from shoal.lab.trace_player import Player, until
from shoal.lab.trace_reading import Timed, Trace
from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.server.events import Began, Event
from shoal.server.quotas import Quotas
from shoal.wire.tensors import row_bytes

PATIENCE_S: Final = 150.0
"""A session without a chain fails after this."""

OVERTIME_S: Final = 180.0
"""Sessions may end this much later than in the trace."""

SETTLE_S: Final = 40.0
"""Until everything must be freed."""

CHECK_PERIOD_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What the lab made of an incident."""

    seed: int
    incident: Incident
    """What happened in the lab, in the form of what happened outside."""
    checked_rows: int
    ended: dict[str, str]
    """Sessions that ended with an error here: label, error."""


def run_replay(incident: Incident, seed: int) -> Replay:
    """Play the incident on virtual time; seed 0 has no jitter, others differ a little.

    Raises:
        WrongText, BrokenInvariant, Deadlock, Livelock, VirtualTimeout: what is wrong with the
            code; a session that finds no chain is no such thing.
    """
    limit_s = incident.end_s + OVERTIME_S + 10 * SETTLE_S
    return run_virtual(lambda: _Stage(incident, seed).run(), timeout_s=limit_s)


class MemoryRecorder:
    """A recorder (`events.Recorder`) that keeps everything, with virtual times."""

    def __init__(self, began: Began) -> None:
        self.began = began
        self.events: list[Timed] = []

    def record(self, event: Event) -> None:
        """Keep it."""
        self.events.append((asyncio.get_running_loop().time(), event))

    @property
    def trace(self) -> Trace:
        """What was recorded."""
        return Trace(began=self.began, events=tuple(self.events))


class _Stage:
    def __init__(self, incident: Incident, seed: int) -> None:
        self._incident = incident
        self._seed = seed
        rng = random.Random(seed)
        jitter_s = incident.delay_s / 4 if seed else 0.0
        link = LinkConditions(delay_s=incident.delay_s, jitter_s=jitter_s)
        self._network = SimulatedNetwork(rng, default=link)
        self._recorders: list[MemoryRecorder] = []
        self._swarm = SimulatedSwarm(
            [_spec(past) for past in incident.servers],
            self._network,
            rng,
            num_blocks=incident.num_blocks,
            server_config=_config(incident),
            mixes_call_shape=True,
            record=self._record,
        )
        self._swarm.directory = GuidedDirectory(SWARM, is_lasting=True)
        self._by_label = {
            past.label: server
            for past, server in zip(incident.servers, self._swarm.servers, strict=True)
        }
        self._clients: dict[str, Client] = {}
        self._players: dict[str, Player] = {}

    def _record(self, began: Began) -> MemoryRecorder:
        self._recorders.append(MemoryRecorder(began))
        return self._recorders[-1]

    async def run(self) -> Replay:
        incident = self._incident
        async with self._swarm:
            for past in incident.sessions:
                if past.owner not in self._clients:
                    self._clients[past.owner] = await self._open_client(past.owner)
                self._players[past.label] = self._player(past)
            background = [asyncio.ensure_future(work) for work in self._background()]
            try:
                await self._play()
            except* Exception as group:
                raise first_error(group) from group
            finally:
                for task in background:
                    task.cancel()
                results = await asyncio.gather(*background, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result
            recorded = [recorder.trace for recorder in self._recorders]
            self._network.heal()
            await asyncio.sleep(SETTLE_S)
            check_end(self._swarm, list(self._clients.values()))
        return Replay(
            seed=self._seed,
            incident=self._found(recorded),
            checked_rows=sum(player.checked_rows for player in self._players.values()),
            ended={
                label: f"{type(player.error).__name__}: {player.error}"
                for label, player in self._players.items()
                if player.error is not None
            },
        )

    async def _open_client(self, owner: str) -> Client:
        mine = (past.standbys for past in self._incident.sessions if past.owner == owner)
        tending = TendConfig(standby=max(mine))
        return await self._swarm.open_client(patience_s=PATIENCE_S, tending=tending)

    async def _play(self) -> None:
        limit_s = self._incident.end_s + OVERTIME_S
        async with asyncio.timeout_at(limit_s), asyncio.TaskGroup() as group:
            for player in self._players.values():
                group.create_task(player.run())
        await until(self._incident.end_s)
        for player in self._players.values():
            player.close()

    def _background(self) -> list[Awaitable[None]]:
        doings: list[Awaitable[None]] = [self._watch()]
        for past in self._incident.servers:
            doings.append(self._live(self._by_label[past.label], past))
        return doings + [self._disturb(one) for one in self._incident.disturbances]

    async def _watch(self) -> None:
        while True:
            check_step(self._swarm)
            await asyncio.sleep(CHECK_PERIOD_S)

    async def _live(self, server: SimulatedServer, past: ServerPast) -> None:
        for life in past.lives:
            await until(life.born_s)
            if not server.is_up:
                await server.start()
            if life.died_s is None:
                return
            await until(life.died_s)
            await server.crash(None if life.how == "silent" else 0.0)

    async def _disturb(self, one: Disturbance) -> None:
        peer, other = self._by_label[one.label].peer, self._by_label[one.other].peer
        await until(one.at_s)
        if one.kind == "freeze":
            self._network.freeze(peer)
            await asyncio.sleep(one.lasts_s)
            self._network.thaw(peer)
        else:
            self._network.isolate(peer, [other])
            await asyncio.sleep(one.lasts_s)
            self._network.mend(peer, other)
            self._network.mend(other, peer)

    def _player(self, past: SessionPast) -> Player:
        guide = Guide(
            [
                {self._by_label[label].peer: Span(start, end) for label, start, end in chain}
                for chain in past.chains
            ]
        )
        parent = self._players.get(past.parent)
        reference = Reference(self._incident.num_blocks, mixes_call_shape=True)
        rng = random.Random(f"{self._seed} {past.label}")
        client = self._clients[past.owner]
        return Player(past, client, guide, reference, rng, parent, self._incident.delay_s)

    def _found(self, traces: Sequence[Trace]) -> Incident:
        names = {player.name: label for label, player in self._players.items() if player.name}
        labels = {short(server.peer): label for label, server in self._by_label.items()}
        return find_incident(traces, labels=labels, names=names)


def _spec(past: ServerPast) -> ServerSpec:
    tokens = 1 << 20 if past.began is None else past.began.cache_tokens
    return ServerSpec(
        name=past.label,
        span=Span(past.start, past.end),
        cache_tokens=tokens,
        iteration_s=past.iteration_s,
        token_s=0.0,
        is_late=not past.lives or past.lives[0].born_s > 0,
    )


def _config(incident: Incident) -> ServerConfig:
    """The bounds of the trace, for toy rows: scaled by the size of a row."""
    began = incident.began
    scale = row_bytes("float32", HIDDEN_SIZE) / began.row_bytes

    def scaled(num_bytes: int, default: int) -> int:
        return max(1, int((num_bytes or default) * scale))

    engine, quotas = EngineLimits(), Quotas()
    return ServerConfig(
        window_bytes=scaled(began.window_bytes, ServerConfig().window_bytes),
        engine=EngineLimits(
            budget_tokens=began.budget_tokens or engine.budget_tokens,
            run_ahead_bytes=scaled(began.run_ahead_bytes, engine.run_ahead_bytes),
            log_bytes_per_session_max=scaled(
                began.log_bytes_per_session, engine.log_bytes_per_session_max
            ),
        ),
        quotas=Quotas(cache_share=1.0, log_bytes_max=scaled(began.log_bytes, quotas.log_bytes_max)),
    )
