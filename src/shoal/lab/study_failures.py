"""Servers that die while they answer: steps per second against the rate of failures.

Source: Borzunov et al. 2023 (arXiv 2312.08361), the table on failures: BLOOM-7.1B in stages of
8, 7, 8 and 7 blocks, and the chance p that a step meets a failure. Here the real client and
servers run on virtual time (fidelity C); blocks take a modelled time that is set so that without
failures as many steps come as published. What a failure costs is not set: detection, repair and
replay are those of the code.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from shoal.base.spans import Span
from shoal.lab.campaign import quiet
from shoal.lab.sim_live import simulate_live
from shoal.lab.sim_result import Served
from shoal.lab.sim_scenario import Event, EventKind, Moves, Reload, Request, Scenario
from shoal.lab.study import Chart, Check, Figure, Report, Row, Task, falling, mean
from shoal.plan.memory import mha
from shoal.plan.placement import Placement
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model

STAGES: Final = (Span(0, 8), Span(8, 15), Span(15, 23), Span(23, 30))
REPLICAS: Final = 3
HIDDEN: Final = 4096
BLOCK_BYTES: Final = 400_000_000
RTT_S: Final = 0.001
TOKENS_IN: Final = 8
BACK_S: Final = 30.0
"""A server that died is back after so long."""

PREFILL_S: Final = 0.12e-3
"""Per block and token: 0.4 GFLOP at 30 % of a GTX 1080 Ti. Assumed, not published."""

CHANCES: Final = ("0", "1e-3", "1e-2")

Column = tuple[float, float | None, float | None]

PUBLISHED: Final[Mapping[str, Mapping[int, Column]]] = {
    "restart": {128: (17.1, 12.0, 0.18), 1024: (15.5, 0.48, None)},
    "no cache": {128: (3.44, 3.44, 3.44), 1024: (0.89, 0.89, 0.89)},
    "petals": {128: (11.4, 10.6, 3.38), 1024: (10.7, 7.76, 2.17)},
}
"""Steps per second by tokens, in the order of `CHANCES`; None: not within an hour."""


def swarm(tokens_out: int) -> Problem:
    """Three servers for each stage, near each other, as fast as published without failures."""
    step_s = 1 / PUBLISHED["petals"][tokens_out][0]
    block_s = (step_s - len(STAGES) * RTT_S) / STAGES[-1].end
    count = len(STAGES) * REPLICAS
    return Problem(
        model=uniform_model(
            STAGES[-1].end, BLOCK_BYTES, mha(32, 128), hidden_size=HIDDEN, row_bytes=2 * HIDDEN,
            keeps_logs=True,
        ),
        servers=tuple(
            ServerSpec(
                name=f"s{number}",
                memory_bytes=11 * 10**9,
                decode=DecodeTimes(points=((1, block_s),)),
                prefill_s_per_block=block_s,
                prefill_s_per_block_token=PREFILL_S,
            )
            for number in range(count)
        ),
        links=Links(
            client_rtt_s=((RTT_S,) * count,), server_rtt_s=((RTT_S,) * count,) * count,
            flow="push",
        ),
        workload=Workload(tokens_in=TOKENS_IN, tokens_out=tokens_out),
    )  # fmt: skip


Death = Literal["killed", "cut off"]
"""The process ends and its streams break; or the machine is silent all at once."""

EVENT_KINDS: Final[dict[Death, tuple[EventKind, EventKind]]] = {
    "killed": ("kill", "join"),
    "cut off": ("cut", "mend"),
}


def scenario(tokens_out: int, chance: float, seed: int, death: Death = "killed") -> Scenario:
    """One answer; servers die at random so often that a step meets it with this chance.

    One of `REPLICAS` servers of a stage is in use, so that many times as many die.
    """
    problem = swarm(tokens_out)
    count = len(problem.servers)
    rng = random.Random(f"failures {seed}")
    events: list[Event] = []
    if chance:
        steps_per_s = PUBLISHED["petals"][tokens_out][0]
        rate = chance * steps_per_s * REPLICAS
        horizon_s = 4 * tokens_out / steps_per_s
        back_s = [0.0] * count
        at_s = rng.expovariate(rate)
        while at_s < horizon_s:
            stage = rng.randrange(len(STAGES))
            mates = range(stage * REPLICAS, (stage + 1) * REPLICAS)
            living = [server for server in mates if back_s[server] <= at_s]
            if len(living) > 1:  # The last of a stage lives: nobody could take over.
                server = rng.choice(living)
                back_s[server] = at_s + BACK_S
                for kind, when_s in zip(EVENT_KINDS[death], (at_s, back_s[server]), strict=True):
                    events.append(Event(at_s=when_s, kind=kind, server=server))
            at_s += rng.expovariate(rate)
    return Scenario(
        problem=problem,
        requests=(Request(at_s=0.0, tokens_in=TOKENS_IN, tokens_out=tokens_out),),
        placement=Placement(spans=tuple(STAGES[number // REPLICAS] for number in range(count))),
        events=tuple(sorted(events, key=lambda event: event.at_s)),
        moves=Moves(reload=Reload()),
        seed=seed,
    )


def answered(tokens_out: int, chance: float, seed: int, death: Death) -> Served:
    """One run of the real client and servers."""
    with quiet():
        return simulate_live(scenario(tokens_out, chance, seed, death)).served[0]


def failures(task: Task) -> Report:
    """Steps per second by the chance of a failure."""
    rows = []
    for tokens_out in (128,) if task.is_quick else (128, 1024):
        clean_s = tokens_out / PUBLISHED["petals"][tokens_out][0]
        for chance, death in CASES:
            seeds = range(1 if chance == "0" else task.seeds)
            told = task.told(f"{tokens_out} tokens, p = {chance}, {death}", seeds)
            runs = [answered(tokens_out, float(chance), seed, death) for seed in told]
            if chance == "0":
                clean_s = runs[0].response_s
            rows.append(_row(tokens_out, chance, death, runs, clean_s))
    chart = Chart(
        table="failures",
        figures=("restart, steps/s", "no cache, steps/s", "petals, steps/s", "ours, steps/s"),
        label="steps per second",
    )
    return Report(rows=tuple(rows), checks=_checks(rows), charts=(chart,), notes=NOTES)


CASES: Final[tuple[tuple[str, Death], ...]] = (
    ("0", "killed"),
    ("1e-3", "killed"),
    ("1e-2", "killed"),
    ("1e-2", "cut off"),
)


def _row(tokens_out: int, chance: str, death: Death, runs: Sequence[Served], clean_s: float) -> Row:
    ended = [run for run in runs if run.has_ended]
    total_s = mean([run.response_s for run in ended])
    repairs = mean([float(run.repairs) for run in ended])
    index = CHANCES.index(chance)
    figures = [
        Figure(name=f"{name}, steps/s", value=value, origin="published")
        for name, columns in PUBLISHED.items()
        if (value := columns[tokens_out][index]) is not None
    ]
    figures.append(Figure(name="ours, steps/s", value=tokens_out / total_s))
    figures.append(Figure(name="ours, repairs per step", value=repairs / tokens_out))
    if repairs:
        lost_s = (total_s - clean_s) / repairs
        figures.append(Figure(name="ours, ms lost per repair", value=1e3 * lost_s))
    figures.append(Figure(name="ours, share answered", value=len(ended) / len(runs)))
    keys = (("tokens", str(tokens_out)), ("p", chance), ("servers are", death))
    return Row(table="failures", keys=keys, figures=tuple(figures))


def _checks(rows: list[Row]) -> tuple[Check, ...]:
    checks = []
    for row in rows:
        keys = dict(row.keys)
        name = f"{keys['tokens']} tokens, p = {keys['p']}, {keys['servers are']}"
        share = row.value("ours, share answered")
        checks.append(
            Check(name=f"{name}: every answer ends", found=f"{share:.0%}", holds=share == 1.0)
        )
        theirs = row.value("petals, steps/s", "published")
        pair = (row.value("ours, steps/s"), theirs)
        checks.append(falling(f"{name}: as many steps as Petals or more", pair, slack=0.05))
    return tuple(checks)


NOTES: Final = (
    "Without failures ours is set to Petals' published figure, so only the fall with p tells "
    "anything. Three servers per stage; who dies is back after 30 s; the last of a stage is "
    "spared. A session opens in some round trips that Petals' figure may lack or have.",
    "Most of the published cells are known to us at second hand. Their figures imply 7 to 35 s "
    "lost per failure; how much of that is detection is not said. A killed process breaks its "
    "streams at once; a machine that is cut off is missed after deadlines (docs/recovery.md).",
    "Blocks are modelled; a replayed token costs 0.12 ms per block (assumed).",
)
