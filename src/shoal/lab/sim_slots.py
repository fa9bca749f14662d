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
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from shoal.base.errors import NoRouteError
from shoal.lab.sim_books import Books
from shoal.lab.sim_jobs import Job, Memory
from shoal.lab.sim_result import Result, Sample
from shoal.lab.sim_scenario import Event, Scenario, back_off_s
from shoal.lab.sim_servers import Servers
from shoal.lab.sim_times import Times
from shoal.plan.compose import needs_on, room_of
from shoal.plan.cost import Hop
from shoal.plan.placement import Placement
from shoal.plan.policies import router
from shoal.plan.route.contract import Choice, Router


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
        self.servers = Servers(self)
        self.times = Times(self.problem)
        self.maker = router(scenario.router)
        self.memory = Memory(room_of(self.problem, self.servers.loaded))
        self.samples: list[Sample] = []
        self._come = 0
        self.running = 0
        """Jobs that have all their memory."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._open()

    def run(self) -> Result:
        self.servers.start()
        for job in self.jobs:
            self.at(job.request.at_s, self._come_in, job)
        while self._heap and (self.alive or self.servers.is_expecting):
            at_s, _, action, arguments = heapq.heappop(self._heap)
            self.now_s = at_s
            action(*arguments)
            self._sample()
        self.servers.pass_time(self.now_s)
        for job in [*self.stranded, *self.queue]:
            job.error = job.error or "there was never memory for it"
        return Result(
            fidelity="b",
            seed=self.scenario.seed,
            served=tuple(job.result() for job in self.jobs),
            placement=self.servers.loaded,
            samples=tuple(self.samples),
            outage_s=self.servers.outage_s,
            history=tuple(self.servers.history),
            moves=self.servers.moves,
            reload_bytes=self.servers.reload_bytes,
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
        job.until_s = self.now_s + self._found_s(choice.wait_s) + self._expected_s(job)
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
                found_s = job.booked_s + self._found_s(self.now_s - job.booked_s)
                if found_s > self.now_s:
                    self.at(found_s, self._start, job, job.epoch)
                else:
                    self._start(job, job.epoch)

    def _found_s(self, wait_s: float) -> float:
        """After how long a session knows that it has its memory, if it waited for it so long."""
        return back_off_s(wait_s) if self.scenario.waiting == "back-off" else wait_s

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

    def change(self, loaded: Placement, event: Event | None) -> None:
        """Servers serve other blocks from now on: whoever ran on lost ones looks for new."""
        booked = [job for job in self.jobs if job.is_booked]
        lost = [job for job in booked if not all(_serves(loaded, hop) for hop in job.chain)]
        for job in lost:
            self._interrupt(job)
        for job in self.jobs:
            job.held = tuple(hop for hop in job.held if _serves(loaded, hop))
        self.memory.resize(room_of(self.problem, loaded))
        self._open()
        self._grant(range(len(loaded.spans)))
        waiting = sorted([*lost, *self.queue, *self.stranded], key=lambda job: job.turn)
        self.queue.clear()
        self.stranded.clear()
        is_silent = event is not None and event.kind in ("kill", "cut")
        delay_s = self.scenario.detect_s if is_silent else 0.0
        for job in waiting:
            if delay_s and job.is_cut_off:
                self.at(self.now_s + delay_s, self._arrive, job)
            else:
                self._arrive(job)
            job.is_cut_off = False

    def _interrupt(self, job: Job) -> None:
        job.is_cut_off = True
        if job.is_running and job.start_s <= self.now_s:
            job.done = job.tokens_at(self.now_s)
            job.repairs += 1
            job.held = job.chain
        job.going_s = math.inf
        self._drop(job)

    def _open(self) -> None:
        """Books and router of the placement that serves now."""
        loaded = self.servers.loaded
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


def _serves(loaded: Placement, hop: Hop) -> bool:
    span = loaded.spans[hop.server]
    return span is not None and span.covers(hop.span)
