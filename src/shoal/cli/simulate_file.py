"""scenario.toml: a cluster as `shoal plan` reads it, and what happens to it.

docs/simulation.md describes the keys; nonsense is told with file, line and key.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, get_args

from shoal.base.errors import ConfigError
from shoal.cli.plan_file import Cluster, read_cluster
from shoal.cli.plan_reader import Table, read_table
from shoal.lab.sim_moves import MOVERS
from shoal.lab.sim_scenario import (
    Event,
    EventKind,
    Moves,
    Reload,
    Request,
    Scenario,
    Waiting,
    bursty,
    draw_requests,
    steady,
)
from shoal.plan.placement import Placement
from shoal.plan.policies import PLACERS, ROUTERS, SOLVED_PLACERS

REQUESTS: Final = 100
REQUESTS_MAX: Final = 100_000
EVENTS_MAX: Final = 10_000
TRACE_BYTES_MAX: Final = 64 << 20

KINDS: Final[tuple[EventKind, ...]] = get_args(EventKind)
WAITINGS: Final[tuple[Waiting, ...]] = get_args(Waiting)
ARRIVALS: Final = ("poisson", "steady", "bursty")
LOADING: Final = ("serve", "down")
RELEASES: Final = ("exact", "expected")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests come, where the file does not list them."""

    kind: str
    count: int
    rate_per_s: float
    variation: float
    sigma: float

    def times_s(self, rng: random.Random) -> Iterator[float]:
        """When they come."""
        if self.kind == "steady":
            return steady(self.rate_per_s)
        return bursty(rng, self.rate_per_s, self.variation)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioFile:
    """A file that was read and checked; `scenario` makes the run of a seed of it."""

    name: str
    cluster: Cluster
    placer: str
    placement: Placement | None
    router: str
    waiting: Waiting
    knows_only_expected: bool
    setup_s: float
    detect_s: float
    moves: Moves
    events: tuple[Event, ...]
    requests: tuple[Request, ...]
    """Those that the file lists; empty: `arrivals` draws them."""
    arrivals: Arrivals | None

    def scenario(self, seed: int) -> Scenario:
        """The run of a seed: its requests, and all chance of rules."""
        problem, requests = self.cluster.problem, self.requests
        if self.arrivals is not None:
            rng = random.Random(seed)
            times_s = self.arrivals.times_s(rng)
            requests = draw_requests(
                problem, times_s, self.arrivals.count, rng, sigma=self.arrivals.sigma
            )
        return Scenario(
            problem=problem,
            requests=requests,
            placer=self.placer,
            placement=self.placement,
            router=self.router,
            events=self.events,
            moves=self.moves,
            waiting=self.waiting,
            knows_only_expected=self.knows_only_expected,
            setup_s=self.setup_s,
            detect_s=self.detect_s,
            seed=seed,
            name=self.name,
        )


def read_scenario(path: Path) -> ScenarioFile:
    """The scenario of a file.

    Raises:
        ConfigError: anything that can't be, with file, line and key.
        ModelError: the model that it names can't be opened.
    """
    top = read_table(path)
    table, events, listed = top.table("simulation"), top.tables("events"), top.tables("requests")
    cluster = read_cluster(top)
    requests = _listed(listed, cluster) or _traced(table, path, cluster)
    arrivals = None if requests else _arrivals(table, cluster)
    read = ScenarioFile(
        name=path.stem,
        cluster=cluster,
        placer=_placer(table, cluster),
        placement=cluster.present,
        router=table.choice("router", list(ROUTERS), "wsrr"),
        waiting=table.choice("waiting", WAITINGS, "notify"),
        knows_only_expected=table.choice("release_times", RELEASES, "exact") == "expected",
        setup_s=table.number("setup_ms", 0.0) / 1e3,
        detect_s=table.number("detect_ms", 0.0) / 1e3,
        moves=_moves(table, cluster),
        events=_events(events, cluster),
        requests=requests,
        arrivals=arrivals,
    )
    table.asked.update(("requests", "arrivals", "variation", "lengths_sigma", "trace"))
    table.done()
    return read


def _placer(table: Table, cluster: Cluster) -> str:
    if cluster.present is not None and "placer" in table:
        raise table.fail("servers say which blocks they have: leave one of the two out", "placer")
    return table.choice("placer", [*PLACERS, *SOLVED_PLACERS], "cgbp")


def _moves(table: Table, cluster: Cluster) -> Moves:
    return Moves(
        rule=table.choice("moves", list(MOVERS), "stay"),
        check_every_s=table.positive("check_every_s") if "check_every_s" in table else math.inf,
        horizon_s=table.positive("horizon_s", 600.0),
        is_down=table.choice("while_loading", LOADING, "serve") == "down",
        reload=Reload(
            by_server=cluster.load_bytes_per_s,
            fixed_s=table.number("load_fixed_s", 0.0),
        ),
    )


def _events(tables: list[Table], cluster: Cluster) -> tuple[Event, ...]:
    names = [server.name for server in cluster.servers]
    events = []
    for table in tables[:EVENTS_MAX]:
        kind = table.choice("kind", KINDS)
        server = names.index(table.choice("server", names))
        events.append(Event(at_s=table.number("at_s"), kind=kind, server=server))
        table.done()
    if len(tables) > EVENTS_MAX:
        raise tables[EVENTS_MAX].fail(f"more than {EVENTS_MAX} events")
    return tuple(events)


def _arrivals(table: Table, cluster: Cluster) -> Arrivals:
    rate = cluster.problem.workload.requests_per_s
    if not rate > 0:
        raise table.fail(
            "when do requests come? Set requests_per_s in [workload], give a trace, or list "
            "[[requests]]"
        )
    kind = table.choice("arrivals", ARRIVALS, "poisson")
    if kind != "bursty" and "variation" in table:
        raise table.fail('goes with arrivals = "bursty"', "variation")
    return Arrivals(
        kind=kind,
        count=table.integer("requests", REQUESTS, high=REQUESTS_MAX),
        rate_per_s=rate,
        variation=table.positive("variation", 4.0) if kind == "bursty" else 1.0,
        sigma=table.number("lengths_sigma", 0.0, high=3.0),
    )


def _listed(tables: list[Table], cluster: Cluster) -> tuple[Request, ...]:
    workload, clients = cluster.problem.workload, cluster.problem.num_clients
    requests = []
    for table in tables:
        requests.append(
            Request(
                at_s=table.number("at_s"),
                tokens_in=table.integer("tokens_in", workload.tokens_in, high=1 << 20),
                tokens_out=table.integer("tokens_out", workload.tokens_out, high=1 << 20),
                client=table.integer("client", 1, high=clients) - 1,
            )
        )
        table.done()
    return tuple(requests)


def _traced(table: Table, path: Path, cluster: Cluster) -> tuple[Request, ...]:
    """Requests of a CSV file with columns at_s, tokens_in, tokens_out; clients take turns."""
    if "trace" not in table:
        return ()
    trace = path.parent / table.text("trace")
    try:
        if trace.stat().st_size > TRACE_BYTES_MAX:
            raise table.fail(f"{trace} is larger than {TRACE_BYTES_MAX} bytes", "trace")
        lines = trace.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise table.fail(f"can't read {trace}: {error}", "trace") from error
    count = table.integer("requests", REQUESTS_MAX, high=REQUESTS_MAX)
    requests: list[Request] = []
    for number, row in enumerate(csv.DictReader(lines), 2):
        if len(requests) == count:
            break
        try:
            requests.append(
                Request(
                    at_s=float(row["at_s"]),
                    tokens_in=int(row["tokens_in"]),
                    tokens_out=int(row["tokens_out"]),
                    client=len(requests) % cluster.problem.num_clients,
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            text = f"{trace}, line {number}: needs numbers at_s, tokens_in and tokens_out"
            raise ConfigError(text) from error
    if not requests:
        raise table.fail(f"{trace} holds no request", "trace")
    return tuple(requests)
