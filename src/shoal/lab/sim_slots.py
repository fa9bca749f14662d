"""Fidelity B: requests take memory along chains, wait for it, and lose it with their servers.

A heap of events. What the published simulators do is kept: memory is taken for a session's
whole length, from its arrival on, at all servers of its chain, first come first served; a
session that can't have it keeps what it got and waits. Steps take what the cost model says of
a session alone: batches and queues at the engine are fidelity C's.

Source: BPRR (arXiv 2512.21884), online setting; chain composition (arXiv 2604.14993) for the
queue of a dispatcher; our own for servers that come, go and move.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from shoal.base.errors import NoRouteError
from shoal.base.spans import Span
from shoal.lab.sim_books import Books
from shoal.lab.sim_jobs import Job, Memory
from shoal.lab.sim_moves import Layout, Targets, moved, mover
from shoal.lab.sim_result import Result, Sample
from shoal.lab.sim_scenario import Event, Scenario, back_off_s, start_placement
from shoal.lab.sim_times import Times
from shoal.plan.change import change_between
from shoal.plan.compose import needs_on, room_of
from shoal.plan.placement import Placement, uncovered
from shoal.plan.policies import router
from shoal.plan.route.contract import Choice, Router

IDLE_CHECKS_MAX: Final = 4
"""Checks per server after which a swarm in which nothing else happens counts as at its end."""


def simulate_slots(scenario: Scenario) -> Result:
    """Run the scenario to its end.

    Raises:
        NoRouteError: the first placement does not cover all blocks.
        ConfigError: a rule that does not exist, or that can't do this problem.
    """
    return _Run(scenario).run()


class _Run:
    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.problem = scenario.problem
        self.now_s = 0.0
        self.jobs = [Job(turn=turn, request=one) for turn, one in enumerate(scenario.requests)]
        self.alive = len(self.jobs)
        self.queue: deque[Job] = deque()
        """Jobs whose dispatcher said: wait until a session ends."""
        self.stranded: list[Job] = []
        """Jobs that no chain could hold; another placement may."""
        self.swarm = _Swarm(self)
        self.times = Times(self.problem)
        self.maker = router(scenario.router)
        self.memory = Memory(room_of(self.problem, self.swarm.loaded))
        self.samples: list[Sample] = []
        self.history = [(0.0, self.swarm.loaded)]
        self._come = 0
        self.running = 0
        """Jobs that have all their memory."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._open()

    def run(self) -> Result:
        for event in self.scenario.events:
            self.at(event.at_s, self.swarm.happen, event)
        for job in self.jobs:
            self.at(job.request.at_s, self._come_in, job)
        self.swarm.start()
        while self._heap and (self.alive or self.swarm.is_expecting):
            at_s, _, action, arguments = heapq.heappop(self._heap)
            self.swarm.pass_time(at_s)
            self.now_s = at_s
            action(*arguments)
            self._sample()
        for job in [*self.stranded, *self.queue]:
            job.error = job.error or "there was never memory for it"
        return Result(
            fidelity="b",
            seed=self.scenario.seed,
            served=tuple(job.result() for job in self.jobs),
            placement=self.swarm.loaded,
            samples=tuple(self.samples),
            outage_s=self.swarm.outage_s,
            history=tuple(self.history),
            moves=self.swarm.moves,
            reload_bytes=self.swarm.reload_bytes,
        )

    def at(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Let something happen."""
        heapq.heappush(self._heap, (at_s, next(self._numbers), action, arguments))

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to happen any more."""
        return not self._heap

    # --- jobs -------------------------------------------------------------------------

    def _come_in(self, job: Job) -> None:
        self._come += 1
        self._arrive(job)

    def _arrive(self, job: Job) -> None:
        # Behind those that wait already, and only then by itself.
        if self.queue or not self._admit(job):
            self.queue.append(job)

    def _admit(self, job: Job) -> bool:
        """Give the job a chain; False: the dispatcher has none free."""
        job.booked_s = self.now_s
        choice: Choice | None = None
        try:
            if isinstance(self.router, NoRouteError):
                raise self.router
            choice = self.router(self.books.load(self.now_s), job.request.client)
        except NoRouteError as error:
            job.error = str(error)
            self.stranded.append(job)
            return True
        if choice is None:
            return False
        if math.isinf(choice.wait_s):
            job.error = "its chain can never hold it"
            self.stranded.append(job)
            return True
        self._book(job, choice)
        return True

    def _book(self, job: Job, choice: Choice) -> None:
        job.chain, job.error = choice.chain, ""
        job.until_s = self.now_s + choice.wait_s + self._expected_s(job)
        self.books.book(job.chain, job.until_s)
        needs = needs_on(self.problem, job.chain)
        job.lacking = set(needs)
        for server, size_bytes in needs.items():
            self.memory.claim(job, server, size_bytes)
        self._grant(needs)

    def _grant(self, servers: Iterable[int]) -> None:
        for server in servers:
            for job in self.memory.grant(server):
                self.running += 1
                wait_s = self.now_s - job.booked_s
                if self.scenario.waiting == "back-off" and wait_s > 0:
                    asked_s = job.booked_s + back_off_s(wait_s)
                    self.at(asked_s, self._start, job, job.epoch)
                else:
                    self._start(job, job.epoch)

    def _expected_s(self, job: Job) -> float:
        """How long the job will hold its chain, as far as rules of routing know."""
        if not self.scenario.knows_only_expected:
            return sum(self._durations(job))
        request, tokens_out = job.request, self.problem.workload.tokens_out
        tokens_in, left = request.tokens_in + job.done, max(1, tokens_out - job.done)
        return self.times.service_s(request.client, job.chain, tokens_in, left)

    def _durations(self, job: Job) -> tuple[float, float]:
        """Seconds until the chain's first token, and of all its further ones."""
        request, chain = job.request, job.chain
        step_s = self._step_s(job)
        if job.done:
            replay_s = self.times.replay_s(request.client, job.held, chain, job.tokens_held)
            first_s = replay_s * request.work + step_s
        else:
            prompt_s = self.times.prompt_s(request.client, chain, request.tokens_in)
            first_s = self.scenario.setup_s + prompt_s * request.work
        return first_s, (request.tokens_out - job.done - 1) * step_s

    def _step_s(self, job: Job) -> float:
        return self.times.step_s(job.request.client, job.chain) * job.request.work

    def _start(self, job: Job, epoch: int) -> None:
        if job.epoch != epoch:
            return
        first_s, rest_s = self._durations(job)
        job.start_s, job.step_s = min(job.start_s, self.now_s), self._step_s(job)
        job.going_s = self.now_s + first_s
        self.at(job.going_s, self._go, job, epoch)
        self.at(job.going_s + rest_s, self._end, job, epoch)

    def _go(self, job: Job, epoch: int) -> None:
        if job.epoch == epoch:
            job.first_s = min(job.first_s, self.now_s)

    def _end(self, job: Job, epoch: int) -> None:
        if job.epoch != epoch:
            return
        job.end_s = self.now_s
        self.alive -= 1
        chain = job.chain
        self._free(job)
        job.chain = chain
        self._admit_queued()

    def _free(self, job: Job) -> None:
        """Take everything from a job; others get it."""
        self._grant(self._drop(job))

    def _drop(self, job: Job) -> list[int]:
        """Take everything from a job that has a chain; returns where."""
        self.running -= job.is_running
        self.books.cancel(job.chain, job.until_s)
        job.epoch += 1
        job.chain = ()
        return self.memory.release(job)

    def _admit_queued(self) -> None:
        while self.queue and self._admit(self.queue[0]):
            self.queue.popleft()

    # --- what the swarm does to them ------------------------------------------------------

    def change(self, loaded: Placement) -> None:
        """Servers serve other blocks from now on: whoever ran on lost ones looks for new."""
        lost = [job for job in self.jobs if job.is_booked and not _is_served(job, loaded)]
        for job in lost:
            self._interrupt(job, loaded)
        self.memory.resize(room_of(self.problem, loaded))
        self.swarm.loaded = loaded
        self.history.append((self.now_s, loaded))
        self._open()
        self._grant(range(len(loaded.spans)))
        waiting = sorted([*lost, *self.queue, *self.stranded], key=lambda job: job.turn)
        self.queue.clear()
        self.stranded.clear()
        delay_s = self.swarm.detect_s
        for job in waiting:
            if delay_s and job.is_cut_off:
                self.at(self.now_s + delay_s, self._arrive, job)
            else:
                self._arrive(job)
            job.is_cut_off = False

    def _interrupt(self, job: Job, loaded: Placement) -> None:
        job.is_cut_off = True
        if job.is_running and job.start_s <= self.now_s:
            job.done = job.tokens_at(self.now_s)
            job.repairs += 1
            job.held = tuple(
                hop
                for hop in job.chain
                if (span := loaded.spans[hop.server]) is not None and span.covers(hop.span)
            )
        job.going_s = math.inf
        self._drop(job)

    def _open(self) -> None:
        """Books and router of the placement that serves now."""
        loaded = self.swarm.loaded
        self.books = Books(self.problem, loaded)
        for job in self.jobs:
            if job.is_booked:
                self.books.book(job.chain, job.until_s)
        self.router: Router | NoRouteError
        try:
            self.router = self.maker(self.problem, loaded)
        except NoRouteError as error:
            self.router = error

    def _sample(self) -> None:
        waiting = self._come - self.running - (len(self.jobs) - self.alive)
        self.samples.append(
            Sample(at_s=self.now_s, running=self.running, waiting=waiting, used=self.memory.used())
        )


def _is_served(job: Job, loaded: Placement) -> bool:
    return all(
        (span := loaded.spans[hop.server]) is not None and span.covers(hop.span)
        for hop in job.chain
    )


class _Swarm:
    """The servers: who is there, who serves what, who loads."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        scenario = run.scenario
        self.problem = scenario.problem
        self.present = set(scenario.present)
        self.planned = self.loaded = start_placement(scenario)
        """Where all are or will be, and what is served now."""
        self.outage_s = 0.0
        self.moves = 0
        self.reload_bytes = 0
        self.detect_s = 0.0
        self._mover = mover(scenario)
        self._rng = random.Random(scenario.seed + 1)
        self._loading: dict[int, int] = {}
        """By server: the number of the load that counts."""
        self._numbers = itertools.count()
        self._idle_checks = 0
        self._to_come = len(scenario.events)
        self._since_s = 0.0

    def start(self) -> None:
        """Begin to check."""
        if math.isfinite(self._run.scenario.moves.check_every_s):
            self._run.at(self._next_check_s(), self._check)

    @property
    def is_expecting(self) -> bool:
        """Whether servers still come, go or load: outages count to the end of it."""
        return bool(self._loading or self._to_come)

    def pass_time(self, at_s: float) -> None:
        """Count how long blocks were without a server."""
        if uncovered(self.problem, self.loaded.spans):
            self.outage_s += at_s - self._since_s
        self._since_s = at_s

    def happen(self, event: Event) -> None:
        """A server comes or goes."""
        server = event.server
        self._to_come -= 1
        if event.kind == "join":
            if server in self.present:
                return
            self.present.add(server)
            self._follow(self._mover.joined(self._layout(), server, self._rng))
            return
        self.present.discard(server)
        self._loading.pop(server, None)
        self.planned = moved(self.problem, self.planned, server, None)
        self.detect_s = self._run.scenario.detect_s if event.kind == "kill" else 0.0
        self._serve(server, None)
        self.detect_s = 0.0
        self._follow(self._mover.left(self._layout(), server, self._rng))

    def _layout(self) -> Layout:
        return Layout(
            placement=self.planned, present=frozenset(self.present), running=self._run.running
        )

    def _next_check_s(self) -> float:
        """Checks come at random, so often on average."""
        return self._run.now_s + self._rng.uniform(0, 2 * self._run.scenario.moves.check_every_s)

    def _check(self) -> None:
        hosted = [server for server, _ in self.planned.hosted() if server not in self._loading]
        if hosted:
            server = self._rng.choice(hosted)
            self._follow(self._mover.checked(self._layout(), server, self._rng))
        self._idle_checks = self._idle_checks + 1 if self._run.is_idle else 0
        if self._idle_checks <= IDLE_CHECKS_MAX * len(self.problem.servers):
            self._run.at(self._next_check_s(), self._check)

    def _follow(self, targets: Targets) -> None:
        """Servers go where a rule says: load, then serve."""
        scenario = self._run.scenario
        after = self.planned
        for server, span in targets.items():
            after = moved(self.problem, after, server, span)
        change = change_between(self.problem, self.planned, after)
        self.planned = after
        for move in change.moves:
            self.moves += move.before is not None
            self.reload_bytes += move.load_bytes
            number = self._loading[move.server] = next(self._numbers)
            if scenario.moves.is_down and move.before is not None:
                self._serve(move.server, None)
            delay_s = scenario.moves.reload.seconds(move.load_bytes)
            self._run.at(self._run.now_s + delay_s, self._loaded, move.server, move.after, number)

    def _loaded(self, server: int, span: Span | None, number: int) -> None:
        if self._loading.get(server) == number:
            del self._loading[server]
            self._serve(server, span)

    def _serve(self, server: int, span: Span | None) -> None:
        if self.loaded.spans[server] != span:
            self._run.change(moved(self.problem, self.loaded, server, span))
