"""Fidelity C: the real client and server run a scenario on virtual time.

Nothing of them is modelled: routes, batches, growing caches, parked sessions, repairs and
replays are those of the code that serves people. Modelled are blocks (`cost_backend`) and the
network. The client chooses chains by itself and opens sessions as it does, so a scenario's
router, `waiting`, `setup_s` and `detect_s` don't count here; but with the router `gca-jffc` each
client has the real dispatcher before it. Every row that comes back is checked.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any, Final

from shoal.base.errors import ConfigError
from shoal.client.client import Client
from shoal.client.dispatch import Dispatcher, open_dispatcher
from shoal.lab.clock import VIRTUAL_LIMIT_S, run_virtual
from shoal.lab.sim_result import Result, Sample
from shoal.lab.sim_scenario import Event, Scenario
from shoal.lab.sim_servers import Servers
from shoal.lab.sim_swarm import LiveServer, LiveSwarm
from shoal.lab.sim_user import Place, User, ask, warm_up
from shoal.plan.placement import Placement
from shoal.server.config import ServerConfig

DISPATCHED: Final = "gca-jffc"
"""The router that stands for a dispatcher."""

Progress = Callable[[int, int], None]
"""Told how many requests are done, and of how many."""


def simulate_live(
    scenario: Scenario,
    *,
    server_config: ServerConfig | None = None,
    progress: Progress | None = None,
    limit_s: float = VIRTUAL_LIMIT_S / 2,
) -> Result:
    """Run the scenario to its end, or for `limit_s` virtual seconds.

    Raises:
        NoRouteError: the first placement does not cover all blocks.
        ConfigError: a rule that does not exist; job sizes, which only lengths have here.
        WrongText: a session answered something else than one machine would.
        Deadlock, Livelock: our code is stuck; the text lists where.
    """
    if any(request.work != 1.0 for request in scenario.requests):
        raise ConfigError("fidelity C runs sessions of given lengths: leave job sizes away")
    return run_virtual(lambda: _Run(scenario, server_config, progress, limit_s).run())


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        server_config: ServerConfig | None,
        progress: Progress | None,
        limit_s: float,
    ) -> None:
        self.scenario = scenario
        self._progress = progress
        self._limit_s = limit_s
        self._users = [User(request=request) for request in scenario.requests]
        self._done = 0
        self._servers = Servers(self)
        self._swarm = LiveSwarm(
            scenario.problem, random.Random(scenario.seed), server_config=server_config
        )
        self._samples: list[Sample] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: asyncio.Future[None] | None = None
        self._order = asyncio.Lock()
        """Servers start and stop one after the other."""
        self._zero_s = 0.0

    # --- Host: what the servers' side needs ----------------------------------------------

    @property
    def now_s(self) -> float:
        """The scenario's time."""
        return asyncio.get_running_loop().time() - self._zero_s

    @property
    def running(self) -> int:
        """Sessions that are open."""
        return sum(user.start_s < math.inf and not user.is_over for user in self._users)

    @property
    def is_idle(self) -> bool:
        """Never: checks end with the run."""
        return False

    def at(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Let something happen at a time of the scenario."""
        asyncio.get_running_loop().call_at(self._zero_s + at_s, action, *arguments)

    def change(self, loaded: Placement, event: Event | None) -> None:
        """Servers serve other blocks from now on."""
        if event is not None and event.kind in ("cut", "mend"):
            self._swarm.reach(event.server, event.kind == "mend")
        else:
            self._spawn(self._follow(loaded, event))
        self._sample()

    async def _follow(self, loaded: Placement, event: Event | None) -> None:
        killed = event.server if event is not None and event.kind == "kill" else None
        async with self._order:
            for server in self._swarm.servers:
                span = loaded.spans[server.number]
                if server.number == killed:
                    await server.kill()
                elif span == server.span or server.number in self._swarm.cut:
                    continue
                elif server.is_up and span is not None:
                    server.move(loaded)
                else:
                    await server.stop()
                    await server.start(loaded)

    # --- the run ------------------------------------------------------------------------

    async def run(self) -> Result:
        self._failure = asyncio.get_running_loop().create_future()
        async with self._swarm as swarm, AsyncExitStack() as stack:
            for server in swarm.servers:
                await server.start(self._servers.loaded)
            for client in swarm.clients:
                await warm_up(client)
            dispatchers = [await self._dispatcher(client, stack) for client in swarm.clients]
            self._zero_s = asyncio.get_running_loop().time()
            self._servers.start()
            self._spawn(swarm.keep_hub())
            asking = asyncio.gather(
                *(self._play(user, dispatchers[user.request.client]) for user in self._users)
            )
            try:
                await self._first_of(asking)
                last_s = max((event.at_s for event in self.scenario.events), default=0.0)
                await asyncio.sleep(max(0.0, last_s - self.now_s))
                self._servers.pass_time(self.now_s)
            finally:
                asking.cancel()
                for task in list(self._tasks):
                    task.cancel()
                await asyncio.gather(asking, *self._tasks, return_exceptions=True)
        return self._result()

    async def _first_of(self, asking: asyncio.Future[Any]) -> None:
        """Until all are answered, somebody fails for good, or time is over."""
        if self._failure is None:
            raise RuntimeError("the run has not begun")
        await asyncio.wait(
            [asking, self._failure],
            timeout=self._limit_s,
            return_when=asyncio.FIRST_COMPLETED,
        )
        for future in (asking, self._failure):
            if future.done():
                future.result()

    async def _dispatcher(self, client: Client, stack: AsyncExitStack) -> Dispatcher | None:
        """Where the scenario routes by a dispatcher: a real one for each client."""
        if self.scenario.router != DISPATCHED:
            return None
        workload = self.scenario.problem.workload
        tokens = workload.tokens_in + workload.tokens_out
        return await stack.enter_async_context(open_dispatcher(client, session_tokens=tokens))

    async def _play(self, user: User, dispatcher: Dispatcher | None) -> None:
        request = user.request
        await asyncio.sleep(max(0.0, request.at_s - self.now_s))
        servers = {server.peer: server.number for server in self._swarm.servers}
        client = self._swarm.clients[request.client]
        self._sample()
        place = Place(client=client, servers=servers, now=lambda: self.now_s, dispatcher=dispatcher)
        await ask(user, place)
        self._done += 1
        self._sample()
        if self._progress is not None:
            self._progress(self._done, len(self._users))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._fail)

    def _fail(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._failure is None or self._failure.done():
            return
        error = task.exception()
        if error is not None:
            self._failure.set_exception(error)

    def _sample(self) -> None:
        come = [user for user in self._users if user.has_come and not user.is_over]
        running = sum(user.start_s < math.inf for user in come)
        used = tuple(_used(server) for server in self._swarm.servers)
        self._samples.append(
            Sample(at_s=self.now_s, running=running, waiting=len(come) - running, used=used)
        )

    def _result(self) -> Result:
        return Result(
            fidelity="c",
            seed=self.scenario.seed,
            served=tuple(user.result() for user in self._users),
            placement=self._servers.loaded,
            samples=tuple(self._samples),
            history=tuple(self._servers.history),
            outage_s=self._servers.outage_s,
            moves=self._servers.moves,
            reload_bytes=self._servers.reload_bytes,
        )


def _used(server: LiveServer) -> float:
    return server.used if server.is_up else 0.0
