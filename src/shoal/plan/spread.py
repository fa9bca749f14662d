"""Sessions that come one by one, each to the chain that is fastest beside those before it.

`compose.seat_all` fills the fastest chain first, which is right where a pass takes as long
for many rows as for one. On measured servers it does not, and replicas share the load.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

from shoal.plan.compose import Seated, needs_on, room_of, seat_all, take
from shoal.plan.cost import Chain, Prices, chain_s, prices, service_s
from shoal.plan.placement import Placement
from shoal.plan.search import Search
from shoal.plan.spec import Problem

ONE_BY_ONE_MAX: Final = 256
"""More sessions than this are seated as `compose.seat_all` does: each costs a search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Who sits where, when all sessions of the workload decode at once."""

    seated: tuple[tuple[Seated, ...], ...]
    """By client; seconds are a decode step's with everybody there."""
    batches: tuple[int, ...]
    """By server: its sessions, which are the rows of its passes."""
    service_s: float
    """Mean seconds of a request, prompt included; 0 if nobody has a seat."""

    @property
    def sessions(self) -> int:
        """Sessions that have a seat."""
        return sum(one.seats for own in self.seated for one in own)


def spread(problem: Problem, placement: Placement) -> Spread:
    """The workload's sessions on a placement."""
    alone = [prices(problem, client, "token") for client in range(problem.num_clients)]
    sessions = problem.workload.sessions
    is_flat = all(len(server.decode.points) == 1 for server in problem.servers)
    if is_flat or sessions > ONE_BY_ONE_MAX:
        found = seat_all(problem, placement, alone, sessions)
        chains = [Counter({one.chain: one.seats for one in own}) for own in found]
    else:
        chains = _one_by_one(problem, placement, alone)
    rows = [0] * len(problem.servers)
    for own in chains:
        for chain, seats in own.items():
            for server in {hop.server for hop in chain}:
                rows[server] += seats
    busy = [max(1, count) for count in rows]
    times = [_with_rows(problem, price, busy) for price in alone]
    seated = tuple(
        tuple(
            Seated(chain=chain, seconds=chain_s(times[client], chain), seats=seats)
            for chain, seats in own.items()
        )
        for client, own in enumerate(chains)
    )
    total = sum(
        one.seats * service_s(problem, client, one.chain, batch=busy)
        for client, own in enumerate(seated)
        for one in own
    )
    count = sum(one.seats for own in seated for one in own)
    return Spread(seated=seated, batches=tuple(rows), service_s=total / count if count else 0.0)


def _one_by_one(
    problem: Problem, placement: Placement, alone: list[Prices]
) -> list[Counter[Chain]]:
    room, rows = room_of(problem, placement), [0] * len(problem.servers)
    chains: list[Counter[Chain]] = [Counter() for _ in alone]
    for session in range(problem.workload.sessions):
        client = session % problem.num_clients
        price = _with_rows(problem, alone[client], [count + 1 for count in rows])
        found = Search(problem, placement, price).cheapest(room=room)
        if found is None:
            continue
        needs = needs_on(problem, found.chain)
        if any(need > room[server] for server, need in needs.items()):
            continue  # It comes to a server twice, which has no room for both runs.
        take(problem, found.chain, room, 1)
        for server in needs:
            rows[server] += 1
        chains[client][found.chain] += 1
    return chains


def _with_rows(problem: Problem, price: Prices, rows: list[int]) -> Prices:
    """The price of a decode step when a server's passes have so many rows."""
    times = zip(problem.servers, rows, strict=True)
    return replace(price, block=tuple(server.decode.at(count) for server, count in times))
