"""Fidelity C: the real client and server run a scenario on virtual time.

Nothing of them is modelled: routes, batches, growing caches, parked sessions, repairs and
replays are those of the code that serves people. Modelled are blocks (`cost_backend`) and the
network. The client chooses chains by itself, so a scenario's router does not count here, nor
does how sessions wait. Every row that comes back is checked.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from shoal.base.errors import ConfigError, ShoalError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.client.chain_session import ChainSession
from shoal.lab.clock import VIRTUAL_LIMIT_S, run_virtual
from shoal.lab.cost_backend import CostSequence, number_of, prompt_number, row_of
from shoal.lab.script import WrongText
from shoal.lab.sim_result import Result, Sample, Served
from shoal.lab.sim_scenario import Request, Scenario
from shoal.lab.sim_servers import Servers
from shoal.lab.sim_swarm import ENCODING, LiveServer, LiveSwarm, hidden_size_of
from shoal.plan.cost import Chain, Hop
from shoal.plan.placement import Placement
from shoal.server.config import ServerConfig

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


@dataclass(slots=True)
class _User:
    """One request on its way; times are the loop's."""

    request: Request
    start_s: float = math.inf
    first_s: float = math.inf
    end_s: float = math.inf
    chain: Chain = ()
    repairs: int = 0
    error: str = ""
    has_come: bool = False


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
        self._users = [_User(request=request) for request in scenario.requests]
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
        return sum(user.start_s < math.inf and not _is_over(user) for user in self._users)

    @property
    def is_idle(self) -> bool:
        """Never: checks end with the run."""
        return False

    def at(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Let something happen at a time of the scenario."""
        asyncio.get_running_loop().call_at(self._zero_s + at_s, action, *arguments)

    def change(self, loaded: Placement, killed: int | None) -> None:
        """Servers serve other blocks from now on."""
        self._spawn(self._follow(loaded, killed))
        self._sample()

    async def _follow(self, loaded: Placement, killed: int | None) -> None:
        async with self._order:
            for server in self._swarm.servers:
                span = loaded.spans[server.number]
                if server.number == killed:
                    await server.kill()
                elif span != server.span:
                    await server.stop()
                    await server.start(loaded)

    # --- the run ------------------------------------------------------------------------

    async def run(self) -> Result:
        self._failure = asyncio.get_running_loop().create_future()
        async with self._swarm as swarm:
            for server in swarm.servers:
                await server.start(self._servers.loaded)
            await self._warm_up()
            self._zero_s = asyncio.get_running_loop().time()
            self._servers.start()
            self._spawn(swarm.keep_hub())
            asking = asyncio.gather(*(self._ask(user) for user in self._users))
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

    async def _warm_up(self) -> None:
        """Each client has had a session already: links are dialled, round trips measured."""
        for client in self._swarm.clients:
            async with await client.open_session(ENCODING) as session:
                await session.step(self._row(prompt_number(0)), 1)

    async def _ask(self, user: _User) -> None:
        request = user.request
        await asyncio.sleep(max(0.0, request.at_s - self.now_s))
        user.has_come = True
        self._sample()
        try:
            client = self._swarm.clients[request.client]
            async with await client.open_session(ENCODING) as session:
                user.start_s = self.now_s
                await self._converse(user, session)
        except WrongText:
            raise
        except ShoalError as error:
            user.error = f"{type(error).__name__}: {error}"
        self._done += 1
        self._sample()
        if self._progress is not None:
            self._progress(self._done, len(self._users))

    async def _converse(self, user: _User, session: ChainSession) -> None:
        """Prompt, then token by token, as a greedy reader does."""
        request = user.request
        reference = CostSequence(Span(0, self.scenario.problem.num_blocks))
        if self.scenario.setup_s:
            await asyncio.sleep(self.scenario.setup_s)
        numbers = [prompt_number(token) for token in range(request.tokens_in)]
        number = await self._step(session, reference, numbers)
        user.first_s = self.now_s
        for _ in range(request.tokens_out - 1):
            number = await self._step(session, reference, [number])
        user.end_s = self.now_s
        user.chain = self._chain(session)
        user.repairs = len(session.recoveries)

    async def _step(
        self, session: ChainSession, reference: CostSequence, numbers: list[int]
    ) -> int:
        payload = b"".join(map(self._row, numbers))
        answer = number_of(await session.step(payload, len(numbers)), ENCODING)
        if answer != [reference.push(number) for number in numbers][-1]:
            raise WrongText(f"wrong row behind position {session.length - 1}")
        return answer

    def _row(self, number: int) -> bytes:
        return row_of(number, hidden_size_of(self.scenario.problem), ENCODING)

    def _chain(self, session: ChainSession) -> Chain:
        numbers: dict[PeerId, int] = {one.peer: one.number for one in self._swarm.servers}
        return tuple(Hop(numbers[stage.peer], stage.span) for stage in session.chain)

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
        come = [user for user in self._users if user.has_come and not _is_over(user)]
        running = sum(user.start_s < math.inf for user in come)
        used = tuple(_used(server) for server in self._swarm.servers)
        self._samples.append(
            Sample(at_s=self.now_s, running=running, waiting=len(come) - running, used=used)
        )

    def _result(self) -> Result:
        return Result(
            fidelity="c",
            seed=self.scenario.seed,
            served=tuple(map(_served, self._users)),
            placement=self._servers.loaded,
            samples=tuple(self._samples),
            history=tuple(self._servers.history),
            outage_s=self._servers.outage_s,
            moves=self._servers.moves,
            reload_bytes=self._servers.reload_bytes,
        )


def _is_over(user: _User) -> bool:
    return user.end_s < math.inf or bool(user.error)


def _used(server: LiveServer) -> float:
    return server.used if server.is_up else 0.0


def _served(user: _User) -> Served:
    request = user.request
    return Served(
        client=request.client,
        at_s=request.at_s,
        tokens_in=request.tokens_in,
        tokens_out=request.tokens_out,
        start_s=user.start_s,
        first_s=user.first_s,
        end_s=user.end_s,
        chain=user.chain,
        repairs=user.repairs,
        error=user.error or ("" if user.end_s < math.inf else "not answered when time was over"),
    )
