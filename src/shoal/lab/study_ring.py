"""A ring of small nodes: MDI-LLM's curves again, on the real client and server code.

Source: Macario, Seferoglu, Koyuncu, MDI-LLM (arXiv 2505.18164): tokens per second of 1, 2 and 3
Jetson TX2 boards with NanoLlama 304M and of 2 and 3 with TinyLlama 1.1B, read off its published
plots. A node of theirs takes one sample per pass and reads all its weights for it.

Here nodes wait as long as blocks of these shapes take on one core of a server, and hops as long
as its software takes, behind a gigabit network. Absolute figures are of that core, not of a
Jetson: only ratios can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from shoal.lab.sim_ring import RingCase, RingResult, Way, simulate_ring
from shoal.lab.study import Chart, Check, Figure, Report, Row, Task, between
from shoal.plan.spec import DecodeTimes

BLOCK_MS: Final = ((1, 3.43), (8, 5.13), (16, 7.26), (32, 11.78))
"""A decode pass through one block of the 1.1B shape by rows: bfloat16, exact engine, one thread
(benchmarks/results/engines_cpu2_2026-11-21: 72.8, 389.7, 550.7 and 679.2 tokens/s of 4 blocks)."""

PREFILL_MS: Final = 0.245
"""A row of a chunk through one block of it (the same file: 1,018 rows/s through 4 blocks)."""

HANDLING_S: Final = 0.0003
"""Software of a hop beside a busy engine (benchmarks/results/hop_cpu2_2026-11-21)."""

NETWORK_S: Final = 0.0001
NETWORK_BYTES_PER_S: Final = 125e6
"""A gigabit network, as the boards had."""

BLOCK_WEIGHTS: Final = {"304M": 19.9e6, "1.1B": 44.0e6}
HEAD_WEIGHTS: Final = {"304M": 32000 * 1024, "1.1B": 32000 * 2048}
"""Blocks and heads of the two shapes: what was not measured is taken by its number of weights."""

WIDTH: Final = {"304M": 1024, "1.1B": 2048}

SPLITS: Final[dict[str, tuple[tuple[int, ...], ...]]] = {
    "304M": ((12,), (5, 7), (3, 4, 5), (2, 3, 3, 4), (1, 2, 3, 3, 3)),
    "1.1B": ((22,), (10, 12), (6, 8, 8), (4, 6, 6, 6), (3, 4, 5, 5, 5)),
}
"""Blocks of 1 to 5 nodes, the starter first: even when its head counts a block and a half."""

PUBLISHED: Final = {
    ("304M", 1): 18.2, ("304M", 2): 26.6, ("304M", 3): 32.0,
    ("1.1B", 2): 13.7, ("1.1B", 3): 18.7,
}  # fmt: skip
"""MDI-LLM's steady tokens per second by model and nodes, one sample per node (3 of 304M)."""

EFFICIENCY: Final = 0.59
"""MDI-LLM's at 3 nodes of 304M: 1.76 of 3."""

SPEEDS: Final = (1.0, 1.0, 0.5)
"""Nodes of the uneven ring."""

UNEVEN: Final = {"even split": (3, 4, 5), "split by speed": (4, 6, 2)}
"""Blocks of 304M, and the same by water-filling with a last node of half the speed."""


WAYS: Final[dict[Way, str]] = {
    "slots": "slots, tokens/s",
    "free": "whoever waits runs, tokens/s",
    "single": "one sample per pass, tokens/s",
}


def case_of(shape: str, splits: tuple[int, ...], samples: int, way: Way = "slots") -> RingCase:
    """A ring of this shape."""
    share = BLOCK_WEIGHTS[shape] / BLOCK_WEIGHTS["1.1B"]
    head = HEAD_WEIGHTS[shape] / BLOCK_WEIGHTS["1.1B"]
    return RingCase(
        splits=splits,
        block=_scaled(share),
        head=_scaled(head),
        samples=samples,
        tokens=(40,),
        prefill_s_per_block_token=PREFILL_MS * share / 1000,
        hop_s=NETWORK_S,
        handling_s=HANDLING_S,
        link_bytes_per_s=NETWORK_BYTES_PER_S,
        row_bytes=2 * WIDTH[shape],
        way=way,
    )


def _scaled(share: float) -> DecodeTimes:
    return DecodeTimes(points=tuple((rows, share * ms / 1000) for rows, ms in BLOCK_MS))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    """One ring beside MDI-LLM's way on the same nodes, and on one node."""

    shape: str
    nodes: int
    samples: int
    slots: RingResult
    single: RingResult
    alone: RingResult
    """One node, one sample per pass."""
    batch: RingResult
    """One node, all samples in one batch."""

    def row(self) -> Row:
        """For the table."""
        gain = self.slots.tokens_per_s / self.alone.tokens_per_s
        single = self.single.tokens_per_s / self.alone.tokens_per_s
        figures = [
            Figure(name="tokens/s", value=self.slots.tokens_per_s),
            Figure(name="slots", value=self.slots.slots),
            Figure(name="busiest node, share", value=max(self.slots.busy)),
            Figure(name="idlest node, share", value=min(self.slots.busy)),
            Figure(name="by one node, one by one", value=gain),
            Figure(
                name="by one node, one batch",
                value=self.slots.tokens_per_s / self.batch.tokens_per_s,
            ),
            Figure(name="one sample per pass, by one node", value=single),
            Figure(name="one sample per pass, efficiency", value=single / self.nodes),
        ]
        known = PUBLISHED.get((self.shape, self.nodes))
        first = PUBLISHED.get((self.shape, 1))
        if known and first and self.samples == self.nodes:
            figures.append(
                Figure(name="MDI-LLM, by one node", value=known / first, origin="published")
            )
        keys = (("model", self.shape), ("nodes", f"{self.nodes}"), ("samples", f"{self.samples}"))
        return Row(table="rings of equal nodes", keys=keys, figures=tuple(figures))


def ring(task: Task) -> Report:
    """MDI-LLM's scaling by nodes and samples, ours beside it, and a ring of uneven nodes."""
    shapes = ("304M",) if task.is_quick else ("304M", "1.1B")
    sizes = (1, 2, 3) if task.is_quick else (1, 2, 3, 4, 5)
    todo = [(shape, nodes) for shape in shapes for nodes in sizes]
    points: list[_Point] = []
    for index in task.told("rings, nodes", range(len(todo))):
        shape, nodes = todo[index]
        points += [_point(shape, nodes, times * nodes) for times in (1, 2, 4)]
    ways, uneven = _ways(), _uneven()
    return Report(
        rows=(*(point.row() for point in points), *ways, *uneven),
        checks=_checks(points, ways, uneven),
        charts=(
            Chart(
                table="rings of equal nodes",
                figures=("by one node, one by one", "one sample per pass, by one node"),
                label="times one node",
            ),
        ),
        notes=NOTES,
    )


def _point(shape: str, nodes: int, samples: int) -> _Point:
    here, alone = SPLITS[shape][nodes - 1], SPLITS[shape][0]
    return _Point(
        shape=shape,
        nodes=nodes,
        samples=samples,
        slots=simulate_ring(case_of(shape, here, samples)),
        single=simulate_ring(case_of(shape, here, samples, "single")),
        alone=simulate_ring(case_of(shape, alone, samples, "single")),
        batch=simulate_ring(replace(case_of(shape, alone, samples), fixed_slots=1)),
    )


def _ways() -> list[Row]:
    """Two nodes, more samples than nodes: slots, and what servers do by themselves."""
    rows = []
    for samples in (4, 8, 24):
        case = case_of("304M", SPLITS["304M"][1], samples)
        figures = [
            Figure(name=name, value=simulate_ring(replace(case, way=way)).tokens_per_s)
            for way, name in WAYS.items()
        ]
        keys = (("nodes", "2"), ("samples", f"{samples}"))
        rows.append(Row(table="how samples go round", keys=keys, figures=tuple(figures)))
    return rows


def _uneven() -> list[Row]:
    """Three nodes, the last at half the speed, split evenly and by speed; 6 samples."""
    rows = []
    for name, splits in UNEVEN.items():
        found = simulate_ring(replace(case_of("304M", splits, 6), speeds=SPEEDS))
        rows.append(
            Row(
                table="a node of half the speed",
                keys=(("split", f"{name}, {'+'.join(map(str, splits))}"),),
                figures=(
                    Figure(name="tokens/s", value=found.tokens_per_s),
                    Figure(name="busiest node, share", value=max(found.busy)),
                    Figure(name="idlest node, share", value=min(found.busy)),
                ),
            )
        )
    return rows


def _checks(points: list[_Point], ways: list[Row], uneven: list[Row]) -> tuple[Check, ...]:
    found = {(point.shape, point.nodes, point.samples): point for point in points}

    def gain(servers: int, samples: int) -> float:
        point = found["304M", servers, samples]
        return point.slots.tokens_per_s / point.alone.tokens_per_s

    even, by_speed = (row.value("tokens/s") for row in uneven)
    three = found["304M", 3, 3].single
    efficiency = three.tokens_per_s / found["304M", 3, 3].alone.tokens_per_s / 3
    return (
        between("304M, 2 nodes, 2 samples, by one node", gain(2, 2), 1.8, 2.01),
        between(
            f"304M, 3 nodes, one sample per pass: efficiency above {EFFICIENCY:.0%}",
            efficiency, EFFICIENCY, 1.0,
        ),
        between("304M, 3 nodes, 12 samples, by 3 samples (theirs stays)",
                gain(3, 12) / gain(3, 3), 1.5, 4.0),
        between(
            "304M, 2 nodes, 24 samples: slots by whoever waits runs",
            ways[-1].value(WAYS["slots"]) / ways[-1].value(WAYS["free"]), 1.15, 2.0,
        ),
        between("split by speed by even split", by_speed / even, 1.1, 2.0),
    )  # fmt: skip


NOTES: Final = (
    "All figures but the published are simulated: real client and server code, nodes that wait as "
    "long as blocks were measured to take. Memory bandwidth that cores share does not count.",
    "One node, one by one, and one sample per pass are MDI-LLM's way on our code: its own Python, "
    "pickle and threads would add to each hop.",
    "MDI-LLM ran 3 samples in all its 304M runs; its 1.1B does not fit into one board, so that no "
    "ratio is published.",
)
