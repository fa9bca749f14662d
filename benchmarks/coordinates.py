"""How wrong are round trips that nobody measured, estimated from gossiped coordinates?

Servers gossip by the real rules on virtual time, with the round trips of real hosts (`--rtts`: a
square matrix in milliseconds, such as PlanetLab's) or of points on a plane. Each knows its own
neighbours' coordinates from Beats, all others' from records, which are signed anew only when
theirs moved. Judged: estimates over all pairs, relative to the truth; beside it what is assumed
without coordinates (100 ms), and how well a client that measured a few servers estimates the rest.
"""

from __future__ import annotations

import argparse
import random
from itertools import combinations
from math import hypot
from pathlib import Path
from statistics import median
from typing import Any, Final

from report import RESULTS, environment, publish
from shoal.base.ids import PeerId
from shoal.lab.gossip import GossipSwarm
from shoal.plan.coordinates import NOWHERE, Coordinate, Sample, distance_s, fit
from shoal.plan.cost import RTT_UNKNOWN_S

MINUTES: Final = (1, 2, 5, 10, 20)
MEASURED: Final = (1, 2, 4, 8)
"""Servers that a client has pinged."""
CLIENTS: Final = 60

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
    publish("coordinates", rows, facts, folder=options.out)


if __name__ == "__main__":
    main()
