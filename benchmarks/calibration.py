"""Does the cost model tell what real servers do? Predicted beside measured.

4 to 8 server processes whose blocks take a known time, on real links with known delays, and
2 servers that compute. Predictions: a, the cost model alone; b, with memory and queues; c,
the real client and server on virtual time. Goals: mean error of a single session at most
10 % (a), under load at most 20 % (c).
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import model_servers
from calibration_blocks import measuring
from calibration_real import Handling, Turns, handling_of, real_case, take_turns
from cost_servers import connected, running
from report import RESULTS, environment, publish
from shoal.base.spans import Span
from shoal.lab.campaign import quiet
from shoal.lab.sim_analytic import simulate_analytic
from shoal.lab.sim_live import simulate_live
from shoal.lab.sim_result import Result, mean
from shoal.lab.sim_scenario import Request, Scenario, draw_requests, poisson
from shoal.lab.sim_slots import simulate_slots
from shoal.lab.sim_user import Place, User, ask, warm_up
from shoal.plan.memory import gqa
from shoal.plan.placement import Placement
from shoal.plan.spec import DecodeTimes, Links, Problem, ServerSpec, Workload, uniform_model

BLOCKS, HIDDEN = 16, 1024
TOKENS_IN, TOKENS_OUT = 96, 24
REQUESTS = 12
ROUNDS = 3
REAL_ROUNDS = 5
HOP_SHAPE = "hop"
"""What a hop between servers that compute costs is measured with this, and holds for others."""

SEATS = 64
FIGURES = ("first_token_s_mean", "step_s_mean", "response_s_mean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is run."""

    name: str
    scenario: Scenario
    delays_s: tuple[float, ...]
    """One way to each server, from whoever comes before it, and back."""
    is_loaded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A line of the table to be."""

    name: str
    is_loaded: bool
    scenario: Scenario
    measure: Callable[[], tuple[Mapping[str, float] | None, Any]]
    """Figures (None: all rounds were disturbed), and all rounds."""


def problem_of(
    spans: tuple[Span, ...], delays_s: tuple[float, ...], block_s: tuple[float, ...],
    handling_s: float, rate: float = 0.0,
) -> Problem:  # fmt: skip
    """Servers with these blocks and times per block; a batch of 8 takes 1.5 times as long."""
    model = uniform_model(
        BLOCKS, 10**6, gqa(4, 64), hidden_size=HIDDEN, row_bytes=2 * HIDDEN, keeps_logs=True
    )
    session = BLOCKS * (TOKENS_IN + TOKENS_OUT) * 2 * 4 * 64 * 2
    servers = tuple(
        ServerSpec(
            name=f"server {index}",
            memory_bytes=10**6 * len(span) + SEATS * session,
            decode=DecodeTimes(points=((1, seconds), (8, 1.5 * seconds))),
            prefill_s_per_block=seconds,
            prefill_s_per_block_token=seconds / 16,
        )
        for index, (span, seconds) in enumerate(zip(spans, block_s, strict=True))
    )
    rtts = tuple(2 * delay_s for delay_s in delays_s)
    return Problem(
        model=model,
        servers=servers,
        links=Links(
            client_rtt_s=(rtts,), server_rtt_s=(rtts,) * len(spans), flow="push",
            handling_s=handling_s, prefill_handling_s=handling_s,
        ),
        workload=Workload(
            tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT, requests_per_s=rate, sessions=4
        ),
    )  # fmt: skip


def even(count: int) -> tuple[Span, ...]:
    """So many servers that share the blocks."""
    borders = [BLOCKS * index // count for index in range(count + 1)]
    return tuple(Span(*pair) for pair in pairwise(borders))


def swarm(count: int) -> tuple[tuple[Span, ...], tuple[float, ...], tuple[float, ...]]:
    """Blocks, ways and times per block of so many servers."""
    if count == 6:  # two chains of three, one of them slower and farther
        return even(3) * 2, (0.030,) * 3 + (0.060,) * 3, (0.008,) * 3 + (0.016,) * 3
    delay_s, block_s = {4: (0.040, 0.010), 8: (0.020, 0.006)}[count]
    delays_s = tuple(delay_s * (1 + index % 3 / 2) for index in range(count))
    return even(count), delays_s, (block_s,) * count


def cases(handling_s: float, *, is_quick: bool) -> list[Case]:
    """Single sessions and load, on 4, 6 and 8 servers."""
    found = []
    for count in (4,) if is_quick else (4, 6, 8):
        spans, delays_s, block_s = swarm(count)
        for rate in (0.0, 0.4) if is_quick else (0.0, 0.2, 0.4):
            problem = problem_of(spans, delays_s, block_s, handling_s, rate)
            rng = random.Random(count)
            requests = draw_requests(problem, poisson(rng, rate or 1.0), REQUESTS, rng)
            if not rate:
                requests = (Request(at_s=0.0, tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT),)
            found.append(
                Case(
                    name=f"{count} servers, {f'{rate:g} requests/s' if rate else 'single'}",
                    scenario=Scenario(
                        problem=problem, requests=requests, router="shortest", seed=1,
                        placement=Placement(spans=spans),
                    ),
                    delays_s=delays_s,
                    is_loaded=rate > 0,
                )
            )  # fmt: skip
    return found


def predicted(scenario: Scenario) -> dict[str, Result]:
    """At all fidelities. Opening a session takes a round trip to its farthest server."""
    first = simulate_analytic(scenario).served[0]
    links = scenario.problem.links
    opening_s = max(links.client_rtt_s[0][hop.server] for hop in first.chain) + links.handling_s
    known = replace(scenario, setup_s=opening_s)
    with quiet():
        live = simulate_live(scenario)
    return {"a": simulate_analytic(known), "b": simulate_slots(known), "c": live}


def measured(case: Case) -> Result:
    """The same requests on real processes, in real time."""
    problem, placement = case.scenario.problem, case.scenario.placement
    if placement is None:
        raise ValueError("a case says who hosts what")
    with running(problem, placement, case.delays_s) as records:
        users = asyncio.run(_play(case.scenario, placement, records))
    return Result(
        fidelity="measured",
        seed=case.scenario.seed,
        served=tuple(user.result() for user in users),
        placement=placement,
    )


async def _play(scenario: Scenario, placement: Placement, records: list[bytes]) -> list[User]:
    users = [User(request=request) for request in scenario.requests]
    async with connected(scenario.problem, placement, records) as (client, numbers):
        for _ in range(3):  # round trips are known, and links are up
            await warm_up(client)
        loop = asyncio.get_running_loop()
        zero_s = loop.time()

        async def play(user: User) -> None:
            await asyncio.sleep(user.request.at_s)
            place = Place(client=client, servers=numbers, now=lambda: loop.time() - zero_s)
            await ask(user, place)

        await asyncio.gather(*map(play, users))
    return users


def measured_handling_s(delay_s: float = 0.0) -> float:
    """What one more hop costs where blocks and links cost nothing: half of what two do."""
    steps = []
    for count in (3, 1):
        spans = even(count)
        problem = problem_of(spans, (delay_s,) * count, (0.0,) * count, 0.0)
        request = Request(at_s=0.0, tokens_in=TOKENS_IN, tokens_out=200)
        scenario = Scenario(
            problem=problem, requests=(request,) * 1, placement=Placement(spans=spans)
        )
        result = measured(Case(name="", scenario=scenario, delays_s=(delay_s,) * count))
        steps.append(result.summary()["step_s_mean"])
    return (steps[0] - steps[1]) / 2


def rows_of(
    name: str, known: Mapping[str, Mapping[str, float]], real: Mapping[str, float] | None
) -> list[dict[str, Any]]:
    """A row per figure: predictions, measurement, errors; None where rounds were disturbed."""
    rows = []
    for figure in FIGURES:
        row: dict[str, Any] = {"case": name, "figure": figure.removesuffix("_mean")}
        row |= {f"predicted_{way}": figures[figure] for way, figures in known.items()}
        seen = row["measured"] = None if real is None else real[figure]
        row |= {
            f"error_{way}": abs(figures[figure] - seen) / seen if seen else None
            for way, figures in known.items()
        }
        rows.append(row)
    return rows


def mape_row(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of all errors, by prediction."""
    row: dict[str, Any] = dict.fromkeys(rows[0], "-") | {"case": name, "figure": "mean error"}
    errors = [key for key in row if key.startswith("error")]
    known = {key: [one[key] for one in rows if one[key] is not None] for key in errors}
    return row | {key: mean(values) if values else None for key, values in known.items()}


def best_of(case: Case, rounds: int) -> tuple[dict[str, float], list[float]]:
    """The round with the shortest responses, and all rounds' responses.

    Whatever else the machine does only makes them longer.
    """
    found = [measured(case).summary() for _ in range(rounds)]
    best = min(found, key=lambda one: one["response_s_mean"])
    return best, [one["response_s_mean"] for one in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """What a table is published with."""

    facts: Mapping[str, Any]
    folder: Path


def compare(theme: str, runs: Sequence[Run], paper: Paper, details: dict[str, Any]) -> None:
    """Predict and measure each run; publish the table."""
    tables: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for run in runs:
        known = {way: result.summary() for way, result in predicted(run.scenario).items()}
        real, taken = run.measure()
        tables[run.is_loaded] += rows_of(run.name, known, real)
        details[run.name] = {"predicted": known, "measured": real, "rounds": taken}
        print(f"{run.name}: measured", flush=True)
    single, loaded = tables[False], tables[True]
    rows = [*single, mape_row("single", single), *loaded, mape_row("under load", loaded)]
    publish(theme, rows, paper.facts, details, paper.folder)


def main() -> None:
    """Every case: predictions, then the real thing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 servers, 1 round")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--only", choices=("known", "computing"), help="one of the two tables")
    options = parser.parse_args()
    rounds = 1 if options.quick else ROUNDS
    paper = Paper(facts=environment(), folder=options.out)
    if options.only != "computing":
        handling_s = min(measured_handling_s() for _ in range(rounds))
        # Many requests are an average already, and take minutes.
        runs = [
            Run(
                name=case.name, is_loaded=case.is_loaded, scenario=case.scenario,
                measure=partial(best_of, case, 1 if case.is_loaded else rounds),
            )
            for case in cases(handling_s, is_quick=options.quick)
        ]  # fmt: skip
        compare("calibration", runs, paper, {"handling_s": handling_s})
    if options.only != "known":
        computing("110m", 1 if options.quick else REAL_ROUNDS, paper)


def computing(shape: str, wanted: int, paper: Paper) -> None:
    """Two servers that compute: what a hop costs comes from another model."""
    hop = in_turns(HOP_SHAPE, (1,), wanted)[1]
    if hop.times is None or hop.summary is None:
        raise SystemExit("no round was undisturbed: measure on an idle machine")
    handling = handling_of(hop.summary, real_case(HOP_SHAPE, 1, Handling(), hop.times))
    details: dict[str, Any] = {"handling": {**asdict(handling), "rounds": hop.details()}}
    runs = []
    for count, turns in in_turns(shape, (1, 2), wanted).items():
        if turns.times is None:
            raise SystemExit("no sample of blocks was undisturbed: measure on an idle machine")
        details[f"blocks, {count} at once"] = asdict(turns.times)
        runs.append(
            Run(
                name=f"{shape}, {count} at once", is_loaded=count > 1,
                scenario=real_case(shape, count, handling, turns.times),
                measure=turns.told,
            )
        )  # fmt: skip
    compare("calibration_computing", runs, paper, details)


def in_turns(shape: str, counts: Sequence[int], wanted: int) -> dict[int, Turns]:
    """Blocks and sessions of a model, by sessions at once."""
    with measuring(shape) as meter, model_servers.running(shape, 2) as servers:
        return asyncio.run(take_turns(shape, servers, meter, counts, wanted))


if __name__ == "__main__":
    main()
