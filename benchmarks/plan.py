"""How long does planning take, and what is it worth?

Three tables. Times of rules and routes against their goals. Mean response times on published
settings, simulated (fidelity B: memory, waiting, back-off; 100 Poisson requests a run): Petals'
placement and routing, published CG-BPRR (CG-BP, WS-RR, back-off), and ours: the placement of
`shoal plan --objective response`, routed by clients (WS-RR, notified) or by a dispatcher (GCA,
JFFC). And mean seconds per token where memory is tight, computed: CG-BP against annealing.
`least` is over single runs. No constant is fitted to anything.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import Any

from plan_settings import Setting, drawn, roomy, settings, tight
from report import environment, publish
from shoal.base.errors import NoRouteError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.lab.sim_scenario import Scenario, Waiting, draw_requests, poisson
from shoal.lab.sim_slots import simulate_slots
from shoal.plan.compose import scorer
from shoal.plan.coordinates import Coordinate, distance_s
from shoal.plan.place.anneal import place_anneal
from shoal.plan.place.cgbp import cgbp, place_cgbp_sweep
from shoal.plan.place.milp import plan_milp
from shoal.plan.place.petals import place_petals_joins
from shoal.plan.placement import Placement
from shoal.plan.proposal import propose
from shoal.plan.route.contract import Active, load_of
from shoal.plan.route.wsrr import route_wsrr
from shoal.plan.routing import choose_chain
from shoal.plan.spec import Problem
from shoal.plan.trying import Budget
from shoal.plan.view import Experience, ServerView, SwarmView

SETUP_S = 0.07
REQUESTS = 100


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """The median core time of doing it: planning is one thread that never waits."""
    taken = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return median(taken)


def times() -> list[dict[str, Any]]:
    """Rules and routes against their goals."""
    large = tight(1000, 126, 64, 3.0, 1)
    sixty = tight(60, 80, 16, 2.0, 1)
    small = roomy(8, 24, 8, 1)
    placement = cgbp(large, 20)
    router = route_wsrr(large, placement)
    first = router(load_of(large, placement), 0)
    load = load_of(large, placement, [Active(first.chain, 5.0)] * 40 if first else [])
    solved = plan_milp(small)
    proven = "milp, proven" if solved.gap < 1e-4 else f"milp, gap {solved.gap:.0%}"
    thousand, many, few = "1,000 servers, 126 blocks", "60 servers, 80 blocks", "8 servers, 24"
    rng = random.Random(0)
    view, client = announced(large, placement)
    blocks = Span(0, large.num_blocks)
    rows: list[tuple[str, str, Callable[[], object], float | str]] = [
        ("cgbp", thousand, lambda: cgbp(large, 20), 1.0),
        ("a route (wsrr) after the first", thousand, lambda: router(load, 0), 0.005),
        (
            "a live client's route",
            thousand,
            lambda: choose_chain(view, blocks, client, random.Random(0)),
            "none",
        ),
        ("anneal", many, lambda: place_anneal(sixty, random.Random(0)), 2.0),
        (proven, few, lambda: plan_milp(small), 30.0),
        ("all rules (shoal plan)", many, lambda: propose(sixty, "latency"), 10.0),
        ("petals, as it is simulated", many, lambda: place_petals_joins(sixty, rng), 1.0),
    ]
    return [
        {"what": what, "size": size, "seconds": seconds(work), "goal": goal}
        for what, size, work, goal in rows
    ]


def announced(problem: Problem, placement: Placement) -> tuple[SwarmView, Experience]:
    """What a client knows of the servers: their records with places, and a fifth of round trips."""
    rng = random.Random(1)
    servers = tuple(
        ServerView(
            peer=PeerId(number.to_bytes(32, "big")), addresses=(), span=span,
            decode_s_by_batch=problem.servers[number].decode.points,
            coordinate=Coordinate(
                point=(rng.uniform(0, 0.1), rng.uniform(0, 0.1), 0.0), height=0.005, error=0.1
            ),
        )
        for number, span in placement.hosted()
    )  # fmt: skip
    here = Coordinate(height=0.005, error=0.1)
    known = {one.peer: distance_s(here, one.coordinate) for one in servers[::5] if one.coordinate}
    view = SwarmView(model="m", num_blocks=problem.num_blocks, hidden_size=1, servers=servers)
    return view, Experience(rtt_s=known, coordinate=here)


def simulated(
    problem: Problem, placement: Placement, router: str, waiting: Waiting, seed: int
) -> float:
    """Mean response time in seconds; who was never served counts as the longest."""
    rng = random.Random(seed)
    arrivals = poisson(rng, problem.workload.requests_per_s)
    result = simulate_slots(
        Scenario(
            problem=problem,
            requests=draw_requests(problem, arrivals, REQUESTS, rng),
            placement=placement,
            router=router,
            waiting=waiting,
            setup_s=SETUP_S,
            seed=seed,
        )
    )
    answered = [one.response_s for one in result.ended]
    lost = len(result.served) - len(answered)
    return fmean([*answered, *[max(answered)] * lost])


def one_run(setting: Setting, seed: int) -> dict[str, float] | None:
    """Mean response times by method; None where Petals' rule can't cover the model."""
    problem = drawn(setting, seed)
    try:
        petals = place_petals_joins(problem, random.Random(seed))
    except NoRouteError:
        return None
    published = cgbp(problem, problem.workload.sessions)
    ours = propose(problem, "response", seed=seed, budget=Budget(moves_max=2000)).best.placement
    return {
        "petals": simulated(problem, petals, "petals", "back-off", seed),
        "bprr": simulated(problem, published, "wsrr", "back-off", seed),
        "ours": simulated(problem, ours, "wsrr", "notify", seed),
        "dispatched": simulated(problem, ours, "gca-jffc", "notify", seed),
    }


def responses(seeds: Iterable[int], chosen: Iterable[Setting]) -> list[dict[str, Any]]:
    """A row per setting, and the means of the gains."""
    rows: list[dict[str, Any]] = []
    for setting in chosen:
        runs = [run for seed in seeds if (run := one_run(setting, seed)) is not None]
        means = {name: fmean(run[name] for run in runs) for name in runs[0]}
        rows.append(
            {
                "setting": setting.name, "scarce": "yes" if setting.is_scarce else "",
                "req_per_s": f"{setting.rate:g}", "tokens": setting.tokens_out,
                "petals_s": means["petals"], "bprr_s": means["bprr"], "ours_s": means["ours"],
                "dispatched_s": means["dispatched"],
                "petals_over_ours": fmean(run["petals"] / run["ours"] for run in runs),
                "bprr_over_ours": fmean(run["bprr"] / run["ours"] for run in runs),
                "bprr_over_ours_least": min(run["bprr"] / run["ours"] for run in runs),
                "runs": len(runs),
            }
        )  # fmt: skip
        print(".", end="", flush=True)
    print()
    return rows + [summary(rows, "yes"), summary(rows, "")]


def summary(rows: list[dict[str, Any]], scarce: str) -> dict[str, Any]:
    """The means over the scarce settings, or over all."""
    mine = [row for row in rows if not scarce or row["scarce"] == scarce]
    means = {
        name: fmean(row[name] for row in mine)
        for name, value in mine[0].items()
        if isinstance(value, float)
    }
    least = "bprr_over_ours_least"
    means[least] = min(row[least] for row in mine)
    text = {"setting": "mean of scarce" if scarce else "mean of all", "scarce": scarce}
    blank = {"req_per_s": "", "tokens": ""}
    return text | blank | means | {"runs": sum(row["runs"] for row in mine)}


def tight_memory(seeds: Iterable[int]) -> list[dict[str, Any]]:
    """CG-BP, its sweep and annealing: mean ms per token of R sessions at once."""
    rows: list[dict[str, Any]] = []
    for servers, blocks, sessions in ((8, 12, 6), (12, 16, 8), (16, 24, 8)):
        for slack in (2.0, 3.0):
            gains, unplaced = [], 0
            sums = {"cgbp": 0.0, "sweep": 0.0, "anneal": 0.0}
            for seed in seeds:
                problem = tight(servers, blocks, sessions, slack, seed)
                score = scorer(problem)
                found = {
                    "cgbp": score(cgbp(problem, sessions)),
                    "sweep": score(place_cgbp_sweep(problem, random.Random(seed))),
                    "anneal": score(place_anneal(problem, random.Random(seed))),
                }
                if any(one.uncovered or one.unplaced for one in found.values()):
                    unplaced += 1
                    continue
                gains.append(found["cgbp"].seconds / found["anneal"].seconds)
                for name, one in found.items():
                    sums[name] += one.seconds
            count = max(1, len(gains))
            rows.append(
                {
                    "servers": servers, "blocks": blocks, "sessions": sessions, "slack": slack,
                    **{f"{name}_ms": total / count * 1e3 for name, total in sums.items()},
                    "mean_gain": fmean(gains), "least_gain": min(gains),
                    "cases": len(gains), "left_out": unplaced,
                }
            )  # fmt: skip
    return rows


def main() -> None:
    """All three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few settings and seeds")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting")
    options = parser.parse_args()
    facts = environment()
    publish("plan", times(), facts)
    seeds = range(1 if options.quick else options.seeds)
    chosen = settings()[:: 6 if options.quick else 1]
    publish("plan_response", responses(seeds, chosen), facts, source="simulated")
    drawings = range(2 if options.quick else 10)
    publish("plan_tight", tight_memory(drawings), facts, source="computed")


if __name__ == "__main__":
    main()
