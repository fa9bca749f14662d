"""Serving training: who trains here, what of it is kept, and what it may take.

One stream per client (`training_stream.py`); a newer one takes an older one's place. All that a
client left here (tensors, kept passes, calls) ends with its stream. Blocks run in the engine's
gaps (`training_queue.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final

from shoal.base.backend import BackendFacts, BlockBackend
from shoal.base.errors import PeerBusy, PeerRefused, ProtocolError
from shoal.base.ids import PeerId
from shoal.base.training import BlockTrainer
from shoal.net.channel import Channel
from shoal.net.origin import Origin
from shoal.server.engine import Engine
from shoal.server.leaving import ELSEWHERE_S, Farewells
from shoal.server.shares import room_for
from shoal.server.training_jobs import PassJob
from shoal.server.training_kept import KeptPasses
from shoal.server.training_limits import TrainingLimits
from shoal.server.training_queue import TrainingQueue
from shoal.server.training_stream import Visitor

CLIENTS_MAX: Final = 64
"""Clients that train at once: each may have some hundred megabytes of rows and tensors here."""

FULL_RETRY_S: Final = 30.0
"""When to come back to a server with as many: steps take seconds, trainings hours."""

IDLE_PLACE_S: Final = 60.0
"""A client without a call for this long gives its place to a newcomer when all are taken."""


class TrainingServer:
    """Runs training passes for the clients of one server."""

    def __init__(
        self,
        backend: BlockBackend,
        engine: Engine,
        farewells: Farewells,
        limits: TrainingLimits | None = None,
    ) -> None:
        """Fills the gaps of `engine`."""
        self.limits = limits or TrainingLimits()
        self.queue = TrainingQueue(share_min=self.limits.share_min)
        self.kept = KeptPasses(
            self.limits.kept_bytes_per_client,
            self.limits.kept_bytes_max,
            origin=self._origin,
            address_share=self.limits.address_share,
        )
        self._backend = backend
        self._engine = engine
        self._farewells = farewells
        self._visitors: dict[PeerId, Visitor] = {}
        engine.fill_gaps(self.queue)

    @property
    def facts(self) -> BackendFacts:
        """Of the backend, now."""
        return self._backend.facts

    @property
    def num_clients(self) -> int:
        """Clients with a stream here."""
        return len(self._visitors)

    @property
    def visitors(self) -> Collection[Visitor]:
        """Whoever has a stream here."""
        return self._visitors.values()

    @property
    def steps(self) -> int:
        """Moves whenever the server computes anything."""
        return self.queue.steps + self._engine.iteration

    async def serve(self, channel: Channel) -> None:
        """Serve one stream until it ends.

        Raises:
            PeerUnreachable, PeerTimeout: it ended, or nothing came of it.
            ProtocolError: nonsense came.
        """
        client = channel.peer
        older = self._visitors.get(client)
        if older is not None:
            older.close()
        elif not self._find_place(channel.origin):
            full = PeerBusy("enough clients train here", retry_after_s=FULL_RETRY_S)
            await channel.refuse(full)
            return
        visitor = self._visitors[client] = Visitor(self, channel)
        try:
            await visitor.run()
        except ProtocolError as error:
            await channel.refuse(error)
            raise
        finally:
            visitor.close()
            if self._visitors.get(client) is visitor:
                del self._visitors[client]

    def _origin(self, client: PeerId) -> Origin | None:
        """Where a client connects from."""
        visitor = self._visitors.get(client)
        return None if visitor is None else visitor.origin

    def _find_place(self, origin: Origin | None) -> bool:
        """Whether there is a place for one more client of this address, or one could be made."""
        near = [client for client in self._visitors if origin and self._origin(client) == origin]
        places = room_for(CLIENTS_MAX, self.limits.address_share, 1)
        if len(near) >= places and not self._make_place(near):
            return False
        return len(self._visitors) < CLIENTS_MAX or self._make_place(self._visitors)

    def _make_place(self, among: Collection[PeerId]) -> bool:
        """Leave whoever has been idle longest; it may come back with all that it needs."""
        now_s = asyncio.get_running_loop().time()
        client = max(among, key=lambda one: self._visitors[one].idle_s(now_s))
        if self._visitors[client].idle_s(now_s) < IDLE_PLACE_S:
            return False
        self._visitors.pop(client).close()
        return True

    def trainer(self) -> BlockTrainer:
        """Who runs passes.

        Raises:
            PeerRefused: nobody.
        """
        trainer = self._backend.trainer() if self.limits.is_open else None
        if trainer is None:
            raise PeerRefused("this server does not train")
        return trainer

    def check_taking(self) -> None:
        """Refuse new calls.

        Raises:
            PeerBusy: the server is leaving.
            PeerRefused: it doesn't train at all.
        """
        self.trainer()
        if self._farewells.is_draining:
            raise PeerBusy("this server is leaving", retry_after_s=ELSEWHERE_S)

    def moved(self) -> None:
        """The backend went to other blocks: let go of the old ones.

        Only between iterations (`Engine.exclusive`). Calls that began are answered `lost`.
        """
        self.kept.forget()
        for visitor in self._visitors.values():
            visitor.moved()

    def add(self, client: PeerId, job: PassJob) -> None:
        """Queue a job."""
        self.queue.add(client, job)
        self._engine.wake()
