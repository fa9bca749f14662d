"""Random schedules of faults against a small swarm; every answer must still be right.

A `Plan` is drawn from a seed and holds everything: servers, links, scripts and faults at
their times. All faults end before `heal_s`, and every block keeps a server that returns,
so every session must finish with the right rows. A plan that fails is shrunk: faults
and scripts are taken away as long as it still fails.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.limits import LOG_BYTES_PER_SESSION_MAX
from shoal.base.spans import Span
from shoal.client.client import Client
from shoal.client.tending import TendConfig
from shoal.lab.clock import run_virtual
from shoal.lab.faults import Fault, FaultKind, Injector
from shoal.lab.invariants import check_contents, check_end, check_step
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.lab.script import Act, Reference, ScriptRunner, draw_script
from shoal.lab.swarm import ServerSpec, SimulatedSwarm
from shoal.lab.toy_adapters import toy_adapter
from shoal.lab.toy_blocks import HIDDEN_SIZE
from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.server.events import Began, Recorder
from shoal.server.quotas import LOG_BYTES_MAX, Quotas

HEAL_S: Final = 20.0
"""Virtual time at which every fault has ended."""

ROW_BYTES: Final = 4 * HIDDEN_SIZE
"""One toy row in float32."""

GHOST_SHARE: Final = 0.3
"""Part of the plans in which a client vanishes."""

LIMIT_S: Final = 400.0
"""Virtual time within which every session must have finished."""

SETTLE_S: Final = 40.0
"""After the last session: longer than every grace period."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UserPlan:
    """One simulated user: on which client, when, and what."""

    client: int
    at_s: float
    seed: int
    script: tuple[Act, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostPlan:
    """A user whose client vanishes at `vanish_s`; nobody must keep anything of it."""

    user: UserPlan
    vanish_s: float
    is_noticed: bool
    """Whether its streams break, as when a process ends; or silence, as without power."""

    def __str__(self) -> str:
        how = "noticed" if self.is_noticed else "unnoticed"
        return f"ghost at {self.user.at_s:.2f} s, gone at {self.vanish_s:.2f} s, {how}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """Everything that happens in one run."""

    seed: int
    num_blocks: int
    servers: tuple[ServerSpec, ...]
    link: LinkConditions
    window_bytes: int
    run_ahead_bytes: int
    budget_tokens: int
    users: tuple[UserPlan, ...]
    faults: tuple[Fault, ...]
    log_bytes_per_session: int = LOG_BYTES_PER_SESSION_MAX
    log_bytes: int = LOG_BYTES_MAX
    adapters_every: int = 0
    """Every so manieth user has a LoRA adapter of its own; 0: nobody has."""
    """Of all sessions together, at one server."""
    ghost: GhostPlan | None = None
    standby: int = 0
    """Standbys for each hop."""

    def __str__(self) -> str:
        servers = ", ".join(f"{s.name}{s.span}" for s in self.servers)
        lines = [f"seed {self.seed}: {self.num_blocks} blocks, {servers}", f"  {self.link}"]
        lines.append(
            f"  window {self.window_bytes} B, run ahead {self.run_ahead_bytes} B, "
            f"budget {self.budget_tokens} tokens, logs {self.log_bytes_per_session} B a session, "
            f"{self.log_bytes} B in all, {self.standby} standbys"
        )
        if self.ghost is not None:
            lines.append(f"  {self.ghost}")
        lines += [
            f"  user at {user.at_s:.2f} s: "
            + ", ".join(f"{act.kind} {act.count}" for act in user.script)
            for user in self.users
        ]
        return "\n".join([*lines, *(f"  {fault}" for fault in self.faults)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosResult:
    """What came of one run that went well."""

    checked_rows: int
    recoveries: int
    virtual_s: float


def draw_plan(seed: int) -> ChaosPlan:
    """The plan of a seed."""
    rng = random.Random(seed)
    num_blocks = rng.randint(2, 6)
    servers = tuple(_draw_servers(rng, num_blocks))
    return ChaosPlan(
        seed=seed,
        num_blocks=num_blocks,
        servers=servers,
        link=_draw_link(rng),
        window_bytes=rng.choice((1, 100, 1000, 1 << 20)),
        run_ahead_bytes=rng.choice((1, 1000, 1 << 20)),
        budget_tokens=rng.choice((1, 16, 512)),
        users=tuple(_draw_user(rng) for _ in range(rng.randint(1, 4))),
        faults=tuple(
            sorted(
                (_draw_fault(rng, len(servers)) for _ in range(rng.randint(1, 8))),
                key=lambda fault: fault.at_s,
            )
        ),
        log_bytes_per_session=rng.choice((ROW_BYTES * 8, ROW_BYTES * 64, 1 << 20)),
        log_bytes=rng.choice((ROW_BYTES * 100, 1 << 20)),
        ghost=_draw_ghost(rng) if rng.random() < GHOST_SHARE else None,
        standby=rng.choice((0, 0, 1)),
    )


def _draw_user(rng: random.Random) -> UserPlan:
    return UserPlan(
        client=rng.randrange(2),
        at_s=rng.uniform(0, 2),
        seed=rng.randrange(1 << 30),
        script=draw_script(rng),
    )


def _draw_ghost(rng: random.Random) -> GhostPlan:
    return GhostPlan(
        user=_draw_user(rng), vanish_s=rng.uniform(0, 6), is_noticed=rng.random() < 0.5
    )


def _draw_servers(rng: random.Random, num_blocks: int) -> Iterator[ServerSpec]:
    """Two to three complete chains, each cut differently."""
    cache_tokens = rng.choice((192, 512, 1 << 14))
    for chain in range(rng.randint(2, 3)):
        num_cuts = rng.randint(0, min(2, num_blocks - 1))
        borders = [0, *sorted(rng.sample(range(1, num_blocks), num_cuts)), num_blocks]
        for index in range(len(borders) - 1):
            yield ServerSpec(
                name=f"s{chain}{index}",
                span=Span(borders[index], borders[index + 1]),
                cache_tokens=cache_tokens,
                iteration_s=rng.choice((0.0, 0.002, 0.02)),
                coarse_truncate=rng.choice((1, 1, 4)),
            )


def _draw_link(rng: random.Random) -> LinkConditions:
    return LinkConditions(
        delay_s=rng.choice((0.0, 0.005, 0.05)),
        rate_bytes_per_s=rng.choice((1e5, 1e9)),
        jitter_s=rng.choice((0.0, 0.02)),
        loss=rng.choice((0.0, 0.01)),
        drop=rng.choice((0.0, 0.0, 0.0, 0.005)),
        duplicate=rng.choice((0.0, 0.0, 0.02)),
        reset=rng.choice((0.0, 0.0, 0.003)),
    )


def _draw_fault(rng: random.Random, num_servers: int) -> Fault:
    kinds: tuple[FaultKind, ...] = (
        "crash", "crash", "crash", "drain", "drain", "vanish", "restart", "neighbours", "all",
        "freeze", "hang", "slow", "cut", "black_hole", "partition", "client_offline",
        "no_dialing", "bad_batch", "poison", "evict", "trim",
    )  # fmt: skip
    at_s = rng.uniform(0, 6)
    return Fault(
        kind=rng.choice(kinds),
        at_s=at_s,
        lasts_s=rng.uniform(0.01, HEAL_S - at_s),
        target=rng.randrange(num_servers),
        other=rng.randrange(num_servers),
    )


def run_plan(plan: ChaosPlan, *, record: Callable[[Began], Recorder] | None = None) -> ChaosResult:
    """Play the plan on virtual time; `record` makes a recorder for each server that starts.

    Raises:
        WrongText, BrokenInvariant, ShoalError, Deadlock, Livelock, VirtualTimeout: what
            went wrong.
    """
    return run_virtual(lambda: _Run(plan, record).run(), timeout_s=10 * LIMIT_S)


class _Run:
    def __init__(self, plan: ChaosPlan, record: Callable[[Began], Recorder] | None = None) -> None:
        self._plan = plan
        self._rng = random.Random(plan.seed + 1)
        self._network = SimulatedNetwork(self._rng, default=plan.link, break_after_s=5.0)
        self._swarm = SimulatedSwarm(
            plan.servers,
            self._network,
            self._rng,
            num_blocks=plan.num_blocks,
            server_config=ServerConfig(
                quotas=Quotas(cache_share=1.0, log_bytes_max=plan.log_bytes),
                window_bytes=plan.window_bytes,
                engine=EngineLimits(
                    budget_tokens=plan.budget_tokens,
                    run_ahead_bytes=plan.run_ahead_bytes,
                    log_bytes_per_session_max=plan.log_bytes_per_session,
                ),
            ),
            mixes_call_shape=True,
            record=record,
        )
        self._clients: list[Client] = []
        self._injector = Injector(self._swarm, self._network, self._clients, self._rng)
        self._rows = 0
        self._recoveries = 0

    async def run(self) -> ChaosResult:
        loop = asyncio.get_running_loop()
        async with self._swarm:
            self._clients += [await self._open_client() for _ in range(2)]
            background = [asyncio.ensure_future(self._watch())]
            background += [asyncio.ensure_future(self._inject(f)) for f in self._plan.faults]
            if self._plan.ghost is not None:
                background.append(asyncio.ensure_future(self._haunt(self._plan.ghost)))
            try:
                async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as users:
                    for user in self._plan.users:
                        users.create_task(self._play(user))
            except* Exception as group:
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)
                raise first_error(group) from group
            finally:
                finished_s = loop.time()
            await asyncio.sleep(max(0.0, HEAL_S - finished_s))
            for task in background[1:]:
                await task
            background[0].cancel()
            with suppress(asyncio.CancelledError):
                await background[0]
            await asyncio.sleep(SETTLE_S)
            check_end(self._swarm, self._clients)
        return ChaosResult(
            checked_rows=self._rows, recoveries=self._recoveries, virtual_s=finished_s
        )

    async def _open_client(self) -> Client:
        tending = TendConfig(standby=self._plan.standby)
        return await self._swarm.open_client(patience_s=LIMIT_S, tending=tending)

    async def _watch(self) -> None:
        while True:
            check_step(self._swarm)
            await asyncio.sleep(0.05)

    async def _play(self, user: UserPlan) -> None:
        await asyncio.sleep(user.at_s)
        client = self._clients[user.client]
        runner = ScriptRunner(
            client, user.script, random.Random(user.seed), self._reference(client, user)
        )
        await runner.run()
        check_step(self._swarm)
        check_contents(self._swarm, runner)
        self._rows += runner.checked_rows
        if runner.session is not None:
            self._recoveries += len(runner.session.recoveries)
            runner.session.close()

    async def _haunt(self, ghost: GhostPlan) -> None:
        client = await self._open_client()
        playing = asyncio.ensure_future(self._play_ghost(client, ghost.user))
        await asyncio.sleep(max(0.0, ghost.vanish_s - asyncio.get_running_loop().time()))
        self._swarm.memory.crash(client.me, detect_after_s=0.0 if ghost.is_noticed else None)
        playing.cancel()
        with suppress(asyncio.CancelledError):
            await playing

    async def _play_ghost(self, client: Client, user: UserPlan) -> None:
        """Like any user, but without saying good-bye."""
        await asyncio.sleep(user.at_s)
        reference = self._reference(client, user)
        await ScriptRunner(client, user.script, random.Random(user.seed), reference).run()

    def _reference(self, client: Client, user: UserPlan) -> Reference:
        """What one machine answers; the client can bring the user's adapter, if there is one."""
        blocks, every, adapter = self._plan.num_blocks, self._plan.adapters_every, None
        if every and user.seed % every == 0:
            adapter = toy_adapter(random.Random(user.seed), blocks)
            client.adapters.add(adapter)
        return Reference(blocks, mixes_call_shape=True, adapter=adapter)

    async def _inject(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        undo = await self._injector.begin(fault)
        await asyncio.sleep(fault.lasts_s)
        await undo()


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of a group, however deep."""
    error = group.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


def shrink(plan: ChaosPlan, fails: Callable[[ChaosPlan], bool]) -> ChaosPlan:
    """A smaller plan that still fails: without the faults, users and acts it doesn't need."""
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(plan):
            if fails(smaller):
                plan, progress = smaller, True
                break
    return plan


def _smaller(plan: ChaosPlan) -> Iterator[ChaosPlan]:
    for index in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:index] + plan.faults[index + 1 :])
    if len(plan.users) > 1:
        for index in range(len(plan.users)):
            yield replace(plan, users=plan.users[:index] + plan.users[index + 1 :])
    for index, user in enumerate(plan.users):
        for cut in range(1, len(user.script)):
            script = user.script[:cut] + user.script[cut + 1 :]
            users = (*plan.users[:index], replace(user, script=script), *plan.users[index + 1 :])
            yield replace(plan, users=users)
    if plan.ghost is not None:
        yield replace(plan, ghost=None)
    if plan.log_bytes_per_session < LOG_BYTES_PER_SESSION_MAX or plan.log_bytes < LOG_BYTES_MAX:
        unbounded = replace(plan, log_bytes=LOG_BYTES_MAX)
        yield replace(unbounded, log_bytes_per_session=LOG_BYTES_PER_SESSION_MAX)
    if plan.link != LinkConditions():
        yield replace(plan, link=LinkConditions(delay_s=plan.link.delay_s))
        for name in ("loss", "drop", "duplicate", "reset", "jitter_s"):
            if getattr(plan.link, name):
                yield replace(plan, link=replace(plan.link, **{name: 0.0}))
