"""How wrong are round trips that nobody measured, estimated from gossiped coordinates?

Servers gossip by the real rules on virtual time, with the round trips of real hosts (`--rtts`: a
square matrix in milliseconds, such as PlanetLab's) or of points on a plane. Each knows its own
neighbours' coordinates from Beats, all others' from records, which are signed anew only when
theirs moved. Judged: estimates over all pairs, relative to the truth; beside it what is assumed
without coordinates (100 ms), and how well a client that measured a few servers estimates the rest.

A second table says what routes gain: clients among the hosts choose chains through servers at
others as the live router does (asking whom they would take until all of those are measured).
Judged by the true round trips around the loop. Both are simulated.
"""

from __future__ import annotations

import argparse
import random
from itertools import combinations, pairwise
from math import hypot
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final, cast

from report import RESULTS, environment, publish
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.lab.gossip import GossipSwarm
from shoal.plan.coordinates import NOWHERE, Coordinate, Sample, distance_s, fit
from shoal.plan.cost import RTT_UNKNOWN_S
from shoal.plan.routing import choose_chain
from shoal.plan.spec import Flow
from shoal.plan.view import Experience, ServerView, SwarmView

MINUTES: Final = (1, 2, 5, 10, 20)
MEASURED: Final = (1, 2, 4, 8)
"""Servers that a client has pinged."""
CLIENTS: Final = 60

BLOCKS: Final = 40
PARTS: Final = 4
"""Chains are of so many servers."""
DECODE_S: Final = 0.001
"""Per block, at every server: only ways differ."""

Matrix = list[list[float]]


def plane(count: int, rng: random.Random) -> Matrix:
    """Points on 150 x 150 ms with a last mile, as in the churn studies; seconds."""
    spots = [(rng.uniform(0, 150), rng.uniform(0, 150), rng.uniform(2, 15)) for _ in range(count)]
    return [[(hypot(a - c, b - d) + m + n) / 1e3 for c, d, n in spots] for a, b, m in spots]


def read(path: Path, count: int, rng: random.Random) -> Matrix:
    """So many hosts of a file."""
    rows = [list(map(float, line.split(","))) for line in path.read_text().split()]
    kept = rng.sample(range(len(rows)), min(count, len(rows)))
    return [[rows[a][b] / 1e3 for b in kept] for a in kept]


def errors(matrix: Matrix, places: list[Coordinate]) -> list[float]:
    """Relative errors of all pairs that have a round trip, the smallest first."""
    return sorted(
        abs(distance_s(places[a], places[b]) - matrix[a][b]) / matrix[a][b]
        for a, b in combinations(range(len(places)), 2)
        if matrix[a][b] > 0
    )


def figures(name: str, found: list[float]) -> dict[str, Any]:
    """A row."""
    return {
        "who": name,
        "median error %": round(100 * median(found), 1),
        "90th percentile %": round(100 * sorted(found)[len(found) * 9 // 10]),
    }


def swarm_of(places: list[Coordinate], client: int, rng: random.Random) -> SwarmView:
    """Servers at all hosts but the client's, a quarter of the model each; what they announce."""
    servers = []
    for host, place in enumerate(places):
        start = rng.randrange(PARTS) * BLOCKS // PARTS
        if host != client:
            servers.append(
                ServerView(
                    peer=PeerId(host.to_bytes(32, "big")), addresses=(), coordinate=place,
                    span=Span(start, start + BLOCKS // PARTS), decode_s_per_block=DECODE_S,
                )
            )  # fmt: skip
    return SwarmView(model="m", num_blocks=BLOCKS, hidden_size=1, servers=tuple(servers))


def routed(view: SwarmView, matrix: Matrix, client: int, flow: Flow, seed: int) -> list[int]:
    """The hosts of the chain that a client takes after asking those that it would take."""
    rng, servers = random.Random(seed), [*view.servers]
    said = {one.peer: one.coordinate for one in servers}
    asked = rng.sample(servers, min(MEASURED[-1], len(servers)))
    known = {one.peer: matrix[client][host_of(one.peer)] for one in asked}
    while True:
        trips = [(said[peer], rtt_s) for peer, rtt_s in known.items()]
        me = fit([Sample(there=there, rtt_s=s) for there, s in trips if there is not None], rng)
        experience = Experience(rtt_s=dict(known), coordinate=me)
        chain = choose_chain(view, Span(0, BLOCKS), experience, random.Random(seed), flow=flow)
        fresh = {stage.peer for stage in chain} - known.keys()
        if not fresh:
            return [host_of(stage.peer) for stage in chain]
        known |= {peer: matrix[client][host_of(peer)] for peer in fresh}


def host_of(peer: PeerId) -> int:
    """The host of a server of `swarm_of`."""
    return int.from_bytes(peer, "big")


def loop_s(matrix: Matrix, client: int, hosts: list[int]) -> float:
    """True seconds on links of one token around the chain."""
    return sum(matrix[one][other] / 2 for one, other in pairwise([client, *hosts, client]))


def least_s(view: SwarmView, matrix: Matrix, client: int) -> float:
    """The same by who knows all round trips."""
    best = {client: 0.0}
    for part in range(PARTS):
        mine = [
            host_of(one.peer) for one in view.servers if one.span.start == part * BLOCKS // PARTS
        ]
        best = {one: min(s + matrix[before][one] / 2 for before, s in best.items()) for one in mine}
    return min(s + matrix[one][client] / 2 for one, s in best.items())


def routes(matrix: Matrix, places: list[Coordinate], rng: random.Random) -> list[dict[str, Any]]:
    """Milliseconds per token on links, by what ways between servers are taken to cost."""
    found: dict[str, list[float]] = {"all by the client": [], "coordinates": [], "all known": []}
    clients = rng.sample(range(len(matrix)), min(CLIENTS, len(matrix)))
    for seed, client in enumerate(clients):
        view = swarm_of(places, client, rng)
        for name, flow in (("all by the client", "hub"), ("coordinates", "push")):
            hosts = routed(view, matrix, client, cast(Flow, flow), seed)
            found[name].append(loop_s(matrix, client, hosts))
        found["all known"].append(least_s(view, matrix, client))
    rows = []
    for name, times in found.items():
        gains = [one / mine for one, mine in zip(found["all by the client"], times, strict=True)]
        deciles = sorted(gains)
        rows.append(
            {
                "ways between servers": name, "mean ms": round(1e3 * fmean(times), 1),
                "median ms": round(1e3 * median(times), 1), "gain": round(fmean(gains), 2),
                "gain p10": round(deciles[len(deciles) // 10], 2),
                "gain p90": round(deciles[len(deciles) * 9 // 10], 2), "clients": len(times),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Gossip, estimate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rtts", type=Path, help="square matrix of milliseconds; default: a plane")
    parser.add_argument("--servers", type=int, default=150)
    parser.add_argument("--minutes", type=int, default=MINUTES[-1], help="of gossip")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    matrix = plane(options.servers, rng)
    if options.rtts is not None:
        matrix = read(options.rtts, options.servers, rng)
    number: dict[PeerId, int] = {}
    swarm = GossipSwarm(rng, lambda one, other: matrix[number[one]][number[other]] / 2)
    swarm.grow(len(matrix))
    number.update({peer: index for index, peer in enumerate(swarm.peers)})
    truth = sorted(matrix[a][b] for a, b in combinations(range(len(matrix)), 2) if matrix[a][b])
    rows = [figures("100 ms for all", [abs(RTT_UNKNOWN_S - one) / one for one in truth])]
    places: list[Coordinate] = []
    for minute in [one for one in MINUTES if one <= options.minutes]:
        swarm.run(60.0 * minute - swarm.now_s)
        places = [one.gossiper.coordinate or NOWHERE for one in swarm.peers.values()]
        rows.append(figures(f"servers after {minute} min", errors(matrix, places)))
        print(rows[-1], flush=True)
    for count in MEASURED:
        found: list[float] = []
        for client in rng.sample(range(len(matrix)), min(CLIENTS, len(matrix))):
            others = [one for one in range(len(matrix)) if matrix[client][one] > 0]
            rng.shuffle(others)
            trips = [Sample(there=places[a], rtt_s=matrix[client][a]) for a in others[:count]]
            me = fit(trips, rng)
            found += [
                abs(distance_s(me, places[a]) - matrix[client][a]) / matrix[client][a]
                for a in others[count:]
            ]
        rows.append(figures(f"client that pinged {count}", found))
    facts = environment() | {
        "servers": len(matrix), "median_rtt_ms": round(1e3 * median(truth), 1),
        "matrix": "plane" if options.rtts is None else options.rtts.name,
    }  # fmt: skip
    publish("coordinates", rows, facts, folder=options.out, source="simulated")
    publish(
        "coordinates_routes", routes(matrix, places, rng), facts,
        folder=options.out, source="simulated",
    )  # fmt: skip


if __name__ == "__main__":
    main()
