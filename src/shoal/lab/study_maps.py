"""Maps of networks for studies: places, cables, and round trips by two rules.

The maps are those of the Internet Topology Zoo as the package `topohub` has them: distances in
kilometres, no delays. The files of delays that BPRR used are not available; theirs come to a
median of 590 km per millisecond on all three maps, faster than light. So there are two rules:
`published` mimics these files, `fibre` is what glass allows.
"""

from __future__ import annotations

import heapq
import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final, Literal

from shoal.base.errors import ConfigError
from shoal.plan.distance import FIBRE_KM_PER_S

Delay = Literal["published", "fibre"]

KM_PER_S: Final[dict[Delay, float]] = {"published": 590_000.0, "fibre": FIBRE_KM_PER_S}


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    """A network: kilometres of cable between places, by the shortest way."""

    name: str
    km: tuple[tuple[float, ...], ...]

    @property
    def num_places(self) -> int:
        """Nodes of the map."""
        return len(self.km)

    def rtt_s(self, one: int, other: int, delay: Delay) -> float:
        """There and back."""
        return 2 * self.km[one][other] / KM_PER_S[delay]


@cache
def load_map(key: str) -> Map:
    """A map of `topohub`, by its key (`topozoo/Abvt`).

    Raises:
        ConfigError: the package is not installed, or has no such map.
    """
    # Not by `topohub.get`, which leaves its file open.
    try:
        file = resources.files("topohub") / "data" / f"{key}.json"
    except ModuleNotFoundError as error:
        raise ConfigError(
            "this study needs maps of networks: pip install 'shoal[study]'"
        ) from error
    if not file.is_file():
        raise ConfigError(f"topohub has no map {key!r}")
    graph = json.loads(file.read_text(encoding="utf-8"))
    numbers = {node["id"]: index for index, node in enumerate(graph["nodes"])}
    cables: list[list[tuple[int, float]]] = [[] for _ in numbers]
    for edge in graph["edges"]:
        one, other = numbers[edge["source"]], numbers[edge["target"]]
        cables[one].append((other, float(edge["dist"])))
        cables[other].append((one, float(edge["dist"])))
    ways = tuple(_distances(cables, start) for start in range(len(numbers)))
    if any(math.isinf(km) for way in ways for km in way):
        raise ConfigError(f"the map {key!r} is not connected")
    return Map(name=key, km=ways)


def _distances(cables: list[list[tuple[int, float]]], start: int) -> tuple[float, ...]:
    best = [math.inf] * len(cables)
    best[start] = 0.0
    heap = [(0.0, start)]
    while heap:
        km, place = heapq.heappop(heap)
        if km > best[place]:
            continue
        for other, more in cables[place]:
            if km + more < best[other]:
                best[other] = km + more
                heapq.heappush(heap, (best[other], other))
    return tuple(best)
