"""The published integer program of BPRR, to check our own against. Slow beyond 6 servers.

Source: BPRR (arXiv 2512.21884), eq. (9) to (13): binary f^r_ij, integer a_j and m_j, and
the products f a_j, f a_i, f m_j, f m_i linearised. Blocks are counted from 1 here, as
there: a server hosts a_j .. a_j + m_j - 1; a client's source is at 0 with m = 1, its sink
at L + 1. Uniform blocks and hub prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.plan.cost import prices
from shoal.plan.place.milp import LIMIT_S, Planned, planned
from shoal.plan.place.program import Program
from shoal.plan.spec import Problem

SOURCE: Final = -1
SINK: Final = -2


@dataclass(frozen=True, slots=True)
class _Edge:
    """The variables of one link of one session: f, f a_j, f a_i, f m_j, f m_i."""

    used: int
    start_to: int
    start_from: int
    size_to: int
    size_from: int


def plan_bigm(
    problem: Problem, *, limit_s: float | None = LIMIT_S, branches_max: int | None = None
) -> Planned:
    """The placement with the least mean price per token, sessions running to span ends.

    For the limits see `Program.solve`.

    Raises:
        NoRouteError: there is none, or it found none in time.
        ConfigError: push prices, or blocks that are not all equal.
    """
    program = _BigM(problem)
    return planned(
        problem, program.program.solve(limit_s=limit_s, branches_max=branches_max), program.spans
    )


class _BigM:
    """The program; see the module's docstring."""

    def __init__(self, problem: Problem) -> None:
        if problem.links.flow != "hub":
            raise ConfigError("the exact rule plans for hub prices only (use anneal for push)")
        weights, caches = set(problem.model.weight_bytes), set(problem.model.caches)
        if len(weights) > 1 or len(caches) > 1 or problem.log_bytes:
            raise ConfigError("the published program is for equal blocks without logs")
        self.problem = problem
        self.blocks = problem.num_blocks
        self.program = Program()
        self.servers = range(len(problem.servers))
        self.starts = [self._position() for _ in self.servers]
        self.sizes = [self._position() for _ in self.servers]
        loads: list[dict[int, float]] = [{} for _ in self.servers]
        for session in range(problem.workload.sessions):
            self._add_session(session % problem.num_clients, loads)
        cache = problem.session_bytes(Span(0, 1))
        for server in self.servers:
            memory = problem.servers[server].memory_bytes
            terms = {var: sign * cache / memory for var, sign in loads[server].items()}
            terms[self.sizes[server]] = problem.model.weight_bytes[0] / memory
            self.program.row(terms, high=1)
            self.program.row({self.starts[server]: 1, self.sizes[server]: 1}, high=self.blocks + 1)

    def spans(self, values: Sequence[float]) -> list[Span | None]:
        """By server: its span."""
        found: list[Span | None] = []
        for start, size in zip(self.starts, self.sizes, strict=True):
            first = round(values[start]) - 1
            found.append(Span(first, first + round(values[size])))
        return found

    def _position(self) -> int:
        var = self.program.variable(high=self.blocks, integer=True)
        self.program.row({var: 1}, low=1)
        return var

    def _add_session(self, client: int, loads: list[dict[int, float]]) -> None:
        price = prices(self.problem, client, "token")
        into: dict[int, dict[int, float]] = {server: {} for server in self.servers}
        out: dict[int, float] = {}
        end: dict[int, float] = {}
        for server in self.servers:
            for before in (SOURCE, *self.servers):
                if before != server:
                    edge = self._add_edge(before, server, price.arrive[server], price.block[server])
                    into[server][edge.used] = 1
                    if before == SOURCE:
                        out[edge.used] = 1
                    else:
                        into[before][edge.used] = -1
                    for var, sign in _blocks_run(edge):
                        loads[server][var] = sign
            last = self._add_edge(server, SINK, 0.0, 0.0)
            into[server][last.used] = -1
            end[last.used] = 1
        self.program.row(out, low=1, high=1)
        self.program.row(end, low=1, high=1)
        for terms in into.values():
            self.program.row(terms, low=0, high=0)

    def _add_edge(self, before: int, server: int, arrive_s: float, block_s: float) -> _Edge:
        new = self.program.variable
        edge = _Edge(
            new(cost=arrive_s, high=1, integer=True),
            *(new(cost=sign * block_s) for sign in (1, -1, 1, -1)),
        )
        most = self.blocks + 1
        self._product(edge, edge.start_to, self._start(server), most)
        self._product(edge, edge.start_from, self._start(before), self.blocks)
        self._product(edge, edge.size_to, self._size(server), self.blocks)
        self._product(edge, edge.size_from, self._size(before), self.blocks)
        # (13e): f a_j <= a_i + m_i.  (13f): f (a_i + m_i) <= a_j + m_j - 1.
        self._at_most({edge.start_to: 1}, before, 0)
        self._at_most({edge.start_from: 1, edge.size_from: 1}, server, 1)
        return edge

    def _at_most(self, terms: dict[int, float], whose: int, less: int) -> None:
        """`terms <= a + m - less` of a server; of the ends, which are constants."""
        if whose >= 0:
            terms = {**terms, self.starts[whose]: -1, self.sizes[whose]: -1}
            self.program.row(terms, high=-less)
        else:
            self.program.row(terms, high=(1 if whose == SOURCE else self.blocks + 2) - less)

    def _start(self, whose: int) -> int | float:
        """A variable's index, or as a float the constant of an end."""
        return self.starts[whose] if whose >= 0 else (0.0 if whose == SOURCE else self.blocks + 1.0)

    def _size(self, whose: int) -> int | float:
        return self.sizes[whose] if whose >= 0 else 1.0

    def _product(self, edge: _Edge, product: int, factor: int | float, most: int) -> None:
        """(9) to (12): `product` is f times `factor`, which is at most `most`."""
        self.program.row({product: 1, edge.used: -most}, high=0)
        if isinstance(factor, float):
            self.program.row({product: 1, edge.used: -factor}, low=0, high=0)
            return
        self.program.row({product: 1, factor: -1}, high=0)
        self.program.row({product: 1, factor: -1, edge.used: -most}, low=-most)


def _blocks_run(edge: _Edge) -> tuple[tuple[int, float], ...]:
    """f k_ij: the blocks that a session runs over this link."""
    return (
        (edge.start_to, 1.0),
        (edge.size_to, 1.0),
        (edge.start_from, -1.0),
        (edge.size_from, -1.0),
    )
