"""What BPRR's gain is worth when its assumptions go: slower links, unknown lengths, bursts.

Source: BPRR (Sun, He, Ji, Parag, arXiv 2512.21884), its testbed on AboveNet and BellCanada, one
assumption after the other taken away. The model alone, no constant.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.errors import NoRouteError
from shoal.lab.sim_scenario import Scenario, bursty, draw_requests, poisson
from shoal.lab.sim_slots import simulate_slots
from shoal.lab.study import Chart, Check, Figure, Report, Row, Task, mean
from shoal.lab.study_bloom import MEMORY_9, MEMORY_26, METHODS, SETUP_S, Load, Memory, placed
from shoal.lab.study_bprr import MAPS, on_map
from shoal.lab.study_maps import Delay, load_map
from shoal.lab.study_real import REAL_NOTES, check_data, real_rows
from shoal.plan.spec import Problem

SIGMA: Final = 0.5
"""Of answers' lengths: log-normal around the workload's."""

VARIATION: Final = 4.0
"""Of bursts: the standard deviation of gaps by their mean, as in published traces."""

PAIR: Final = ("petals", "proposed")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is true of it."""

    name: str
    delay: Delay = "published"
    sigma: float = 0.0
    is_bursty: bool = False


WORLDS: Final = (
    World(name="as published"),
    World(name="light in fibre", delay="fibre"),
    World(name="unknown lengths", sigma=SIGMA),
    World(name="bursts", is_bursty=True),
    World(name="all three", delay="fibre", sigma=SIGMA, is_bursty=True),
)

BEDS: Final[tuple[tuple[str, int, int, Memory], ...]] = (
    ("AboveNet", 9, 2, MEMORY_9),
    ("BellCanada", 26, 5, MEMORY_26),
)
LOAD: Final = Load(requests_per_s=0.5, tokens_out=128)


def run_in(world: World, problem: Problem, method: str, seed: int) -> dict[str, float]:
    """One run at fidelity B.

    Raises:
        NoRouteError: the method leaves blocks uncovered.
    """
    rng = random.Random(f"requests {seed}")
    rate = LOAD.requests_per_s
    arrivals = bursty(rng, rate, VARIATION) if world.is_bursty else poisson(rng, rate)
    requests = draw_requests(problem, arrivals, LOAD.requests, rng, sigma=world.sigma)
    longest = max(one.tokens_out for one in requests)
    # Memory is reserved for the longest answer: whoever reserves less would have to stop.
    workload = replace(problem.workload, tokens_out=max(longest, LOAD.tokens_out))
    rules = METHODS[method]
    return simulate_slots(
        Scenario(
            problem=replace(problem, workload=workload),
            requests=requests,
            placement=placed(problem, method, seed),
            router=rules.router,
            waiting=rules.waiting,
            knows_only_expected=bool(world.sigma),
            setup_s=SETUP_S,
            seed=seed,
        )
    ).summary()


def realism(task: Task) -> Report:
    """Petals and the proposal in each world.

    Raises:
        ConfigError: the user's data does not suffice.
    """
    check_data(task)
    rows = []
    for map_name, count, num_fast, memory in BEDS[: 1 if task.is_quick else None]:
        network = load_map(MAPS[map_name])
        for world in WORLDS:
            cases = []
            for seed in task.told(f"{map_name}, {world.name}", range(task.seeds)):
                problem = on_map(network, count, num_fast, LOAD, memory, world.delay, seed)
                try:
                    cases.append({name: run_in(world, problem, name, seed) for name in PAIR})
                except NoRouteError:
                    continue  # Petals' rule can't cover the model in this draw.
            figures = []
            for name in PAIR:
                token_s = mean([case[name]["response_s_mean"] for case in cases])
                wait_s = mean([case[name]["wait_s_mean"] for case in cases])
                figures.append(Figure(name=f"{name}, response s", value=token_s))
                figures.append(Figure(name=f"{name}, wait s", value=wait_s))
            petals_s, proposed_s = figures[0].value, figures[2].value
            figures.append(Figure(name="reduction", value=1 - proposed_s / petals_s))
            figures.append(Figure(name="cases", value=len(cases)))
            keys = (("map", map_name), ("world", world.name))
            rows.append(Row(table="worlds", keys=keys, figures=tuple(figures)))
    chart = Chart(
        table="worlds", figures=tuple(f"{name}, response s" for name in PAIR), label="response, s"
    )
    real, checks = real_rows(task)
    notes = (*NOTES, *REAL_NOTES, *task.data.provenances) if real else (*NOTES, WITHOUT_DATA)
    return Report(
        rows=(*rows, *real), checks=(*_checks(rows), *checks), charts=(chart,), notes=notes
    )


def _checks(rows: list[Row]) -> tuple[Check, ...]:
    checks = []
    for row in rows:
        reduction = row.value("reduction")
        keys = dict(row.keys)
        checks.append(
            Check(
                name=f"{keys['map']}, {keys['world']}: the proposal is quicker by 10 % or more",
                found=f"{reduction:.0%}",
                holds=reduction >= 0.1,
            )
        )
    return tuple(checks)


NOTES: Final = (
    "0.5 requests/s of 20 + 128 tokens, no constant added. Unknown lengths: log-normal, sigma 0.5; "
    "placements are made for the mean, memory is reserved for the longest, and routes know no "
    "more than that: most of the waiting comes of it. Bursts: gaps with 4 times the "
    "variation of Poisson's. Fibre: round trips 2.95 times as long.",
)

WITHOUT_DATA: Final = (
    "Not shown: round trips of real hosts (--rtts FILE) and, on them, recorded requests "
    "(--requests FILE) with caches that grow. No such data comes with Shoal."
)
