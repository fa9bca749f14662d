"""What a simulation is asked: a problem, rules by name, requests, and what happens to servers.

The same scenario runs at three fidelities: A (`sim_analytic`) reckons every request alone, B
(`sim_slots`) knows memory and queues, C (`sim_live`) runs the real client and server on
virtual time. Policies are those of `shoal.plan`, by name; none is written again here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from shoal.base.errors import ConfigError
from shoal.plan.placement import Placement, check_placement
from shoal.plan.policies import placer
from shoal.plan.spec import Problem

EventKind = Literal["join", "leave", "kill", "cut", "mend"]
"""join: a server loads its blocks and serves. leave: it goes, and says so. kill: it dies.
cut: nobody reaches it, though it lives; mend: it is reached again, and has its blocks."""

Waiting = Literal["notify", "back-off"]
"""How a session learns that its memory is free: at once, or when it asks again after
1, 2, 4, ... up to 60 s, as Petals' client does."""

BACK_OFF_S_MAX: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One session: a prompt and its answer."""

    at_s: float
    tokens_in: int
    tokens_out: int
    client: int = 0
    work: float = 1.0
    """Its service takes this many times as long: job sizes of a chosen distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happens to a server."""

    at_s: float
    kind: EventKind
    server: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reload:
    """What it costs to load blocks."""

    bytes_per_s: float = math.inf
    by_server: tuple[float, ...] = ()
    """Bytes per second of each server; empty: `bytes_per_s` for all."""
    fixed_s: float = 0.0

    def seconds(self, server: int, num_bytes: int) -> float:
        """Until so many bytes of weights are there; nothing to load takes no time."""
        rate = self.by_server[server] if self.by_server else self.bytes_per_s
        return self.fixed_s + num_bytes / rate if num_bytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """How servers that join choose their blocks, and whether they move later."""

    rule: str = "stay"
    """A name of `sim_moves.MOVERS`."""
    check_every_s: float = math.inf
    """Every so often one server checks whether it should move."""
    horizon_s: float = 600.0
    """How far ahead a rule that counts the cost of moving looks."""
    is_down: bool = False
    """Servers don't serve while they reload, as Petals' don't. Else the old blocks are served
    until the new ones are there."""
    reload: Reload = field(default_factory=Reload)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that a run depends on, its seed included."""

    problem: Problem
    """All servers that ever take part. Its workload is what rules reckon with: the lengths
    that memory is reserved for, the rate, the sessions that a placement is made for."""
    requests: tuple[Request, ...]
    placer: str = "cgbp"
    placement: Placement | None = None
    """Where all begin; None: as the placer says for the servers that are there."""
    router: str = "wsrr"
    events: tuple[Event, ...] = ()
    moves: Moves = field(default_factory=Moves)
    waiting: Waiting = "notify"
    knows_only_expected: bool = False
    """Rules of routing don't know how long answers get: they expect the workload's lengths.
    Else release times are exact, as in the published simulators (fidelity B)."""
    setup_s: float = 0.0
    """Added to each request before its prompt: opening a session."""
    detect_s: float = 0.0
    """Until the clients of a server that died or was cut off know it (fidelity B)."""
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        count, clients = len(self.problem.servers), self.problem.num_clients
        if any(not 0 <= event.server < count for event in self.events):
            raise ConfigError(f"an event names a server that is none of the {count}")
        for one in self.requests:
            if not 0 <= one.client < clients:
                raise ConfigError(f"request of client {one.client}: there are {clients} (from 0)")
            if min(one.tokens_in, one.tokens_out) < 1 or one.at_s < 0 or not one.work > 0:
                raise ConfigError(
                    "a request needs at least 1 token in and 1 out, a time from 0 s on, and work"
                )
        if len(self.moves.reload.by_server) not in (0, count):
            raise ConfigError(f"rates of loading for {count} servers, or for none")
        if self.placement is not None:
            check_placement(self.problem, self.placement)

    @property
    def present(self) -> tuple[int, ...]:
        """The servers that are there from the start: all whose first event is no join."""
        first: dict[int, Event] = {}
        for event in sorted(self.events, key=lambda event: event.at_s):
            first.setdefault(event.server, event)
        return tuple(
            server
            for server in range(len(self.problem.servers))
            if server not in first or first[server].kind != "join"
        )


def start_placement(scenario: Scenario) -> Placement:
    """Where all servers begin that are there from the start.

    Raises:
        NoRouteError: the placer can't cover all blocks with them.
        ConfigError: it is unknown, or can't plan such a problem.
    """
    if scenario.placement is not None:
        placement = scenario.placement
        for server in set(range(len(placement.spans))) - set(scenario.present):
            placement = placement.moved(server, None)
        return placement
    return place_among(
        scenario.problem, scenario.present, scenario.placer, random.Random(scenario.seed)
    )


def place_among(
    problem: Problem, servers: Sequence[int], rule: str, rng: random.Random
) -> Placement:
    """A rule's placement of some of the servers; the others host nothing. Raises as a placer."""
    count = len(problem.servers)
    part = problem if len(servers) == count else _restricted(problem, servers)
    found = placer(rule)(part, rng)
    placement = Placement(spans=(None,) * count)
    if found.cache_bytes is not None:
        caches = dict(zip(servers, found.cache_bytes, strict=True))
        placement = replace(
            placement, cache_bytes=tuple(caches.get(one, 0) for one in range(count))
        )
    for index, span in found.hosted():
        placement = placement.moved(servers[index], span)
    return placement


def _restricted(problem: Problem, servers: Sequence[int]) -> Problem:
    """The problem with only some of its servers."""
    links = problem.links

    def only(row: Sequence[float]) -> tuple[float, ...]:
        return tuple(row[server] for server in servers)

    between = links.server_rtt_s
    if between is not None:
        between = tuple(only(between[server]) for server in servers)
    return replace(
        problem,
        servers=tuple(problem.servers[server] for server in servers),
        links=replace(
            links, client_rtt_s=tuple(map(only, links.client_rtt_s)), server_rtt_s=between
        ),
    )


def with_lengths(problem: Problem, tokens_in: int, tokens_out: int) -> Problem:
    """The problem with sessions of other lengths, to price one of them."""
    workload = replace(problem.workload, tokens_in=tokens_in, tokens_out=tokens_out)
    return replace(problem, workload=workload)


def back_off_s(wait_s: float) -> float:
    """When a session that asks again after 1, 2, 4, ... 60 s finds out: at or after `wait_s`."""
    asked_s, pause_s = 0.0, 1.0
    while asked_s < wait_s:
        asked_s += pause_s
        pause_s = min(BACK_OFF_S_MAX, 2 * pause_s)
    return asked_s


# --- requests ---------------------------------------------------------------------------


def poisson(rng: random.Random, rate_per_s: float) -> Iterator[float]:
    """Times of arrival with exponential gaps, the first at 0 s."""
    return bursty(rng, rate_per_s, 1.0)


def bursty(rng: random.Random, rate_per_s: float, variation: float) -> Iterator[float]:
    """Times of arrival with Gamma gaps: `variation` is their standard deviation by the mean.

    1 is Poisson; Azure's traces look like 4 and more.

    Raises:
        ConfigError: no rate or variation above 0.
    """
    if not rate_per_s > 0 or not variation > 0:
        raise ConfigError("arrivals need a rate and a variation above 0")
    shape = variation**-2
    at_s = 0.0
    while True:
        yield at_s
        at_s += rng.gammavariate(shape, 1 / (rate_per_s * shape))


def steady(rate_per_s: float) -> Iterator[float]:
    """Times of arrival with equal gaps, the first at 0 s."""
    index = 0
    while True:
        yield index / rate_per_s
        index += 1


def draw_requests(
    problem: Problem,
    times_s: Iterable[float],
    count: int,
    rng: random.Random,
    *,
    sigma: float = 0.0,
    exponential_work: bool = False,
) -> tuple[Request, ...]:
    """`count` requests of the workload's lengths, from all clients at random.

    `sigma`: lengths of answers are log-normal around it, the mean as it was.
    `exponential_work`: service times are exponential, as Theorem 4 assumes.
    """
    workload = problem.workload
    requests = []
    for _, at_s in zip(range(count), times_s, strict=False):
        tokens_out = workload.tokens_out
        if sigma:
            drawn = round(tokens_out * math.exp(rng.gauss(-sigma * sigma / 2, sigma)))
            tokens_out = max(1, drawn)
        requests.append(
            Request(
                at_s=at_s,
                tokens_in=workload.tokens_in,
                tokens_out=tokens_out,
                client=rng.randrange(problem.num_clients),
                work=max(1e-9, rng.expovariate(1.0)) if exponential_work else 1.0,
            )
        )
    return tuple(requests)
