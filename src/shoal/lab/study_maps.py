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
from pathlib import Path
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


def read_map(path: Path) -> Map:
    """A map from a file of the REPETITA kind, as the papers used: delays in microseconds.

    Lines `NODES n`, a heading, n lines of nodes; `EDGES m`, a heading, m lines `label from to
    weight bandwidth delay`. Kilometres are what its delays come to by `published`, so that these
    are the file's own. Named by the file.

    Raises:
        ConfigError: it can't be read, or is no such map.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error
    nodes, edges = _section(path, lines, "NODES"), _section(path, lines, "EDGES")
    cables: list[list[tuple[int, float]]] = [[] for _ in nodes]
    for edge in edges:
        try:
            one, other, delay_us = int(edge[1]), int(edge[2]), float(edge[5])
            if min(one, other) < 0 or not 0 <= delay_us < math.inf:
                raise ValueError("numbers from 0 on")
            cables[one].append((other, delay_us / 1e6 * KM_PER_S["published"]))
            cables[other]  # That node must be there, too.
        except (IndexError, ValueError) as error:
            raise ConfigError(
                f"{path}: the edge {' '.join(edge)!r} is not `label from to weight bandwidth "
                f"delay` between {len(nodes)} nodes"
            ) from error
    ways = tuple(_distances(cables, start) for start in range(len(nodes)))
    if not nodes or any(math.isinf(km) for way in ways for km in way):
        raise ConfigError(f"the map {path} is not connected")
    return Map(name=path.stem, km=ways)


def _section(path: Path, lines: list[str], word: str) -> list[list[str]]:
    """The fields of the lines below `word` and the heading."""
    start = next((at for at, line in enumerate(lines) if line.split()[:1] == [word]), None)
    counts = [] if start is None else lines[start].split()[1:]
    if start is None or not counts or not counts[0].isdigit():
        raise ConfigError(f"{path} has no line `{word} COUNT`")
    found = [line.split() for line in lines[start + 2 : start + 2 + int(counts[0])]]
    if len(found) < int(counts[0]):
        raise ConfigError(f"{path} ends before {counts[0]} lines of {word}")
    return found


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
