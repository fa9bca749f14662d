"""Fidelity A: every request as if it were alone, and what theory says of all together."""

from __future__ import annotations

import math

from shoal.base.errors import NoRouteError
from shoal.lab.sim_result import Result, Served
from shoal.lab.sim_scenario import Request, Scenario, start_placement
from shoal.lab.sim_times import Times
from shoal.plan.bounds import mean_response_s, request_bound_s
from shoal.plan.compose import composed, predict
from shoal.plan.cost import Chain
from shoal.plan.placement import Placement
from shoal.plan.policies import router
from shoal.plan.route.contract import load_of


def simulate_analytic(scenario: Scenario) -> Result:
    """Price the scenario's requests on its first placement; servers stay as they are.

    `facts`: the least seconds per token that any placement could have, tokens per second when
    the workload's sessions all decode in step, and Theorem 4's bounds of the mean response
    time at the workload's rate (for a dispatcher; infinite when it is too high).

    Raises:
        NoRouteError: blocks are uncovered, or no chain can hold a session.
        ConfigError: a rule that does not exist, or that can't do this problem.
    """
    problem = scenario.problem
    placement = start_placement(scenario)
    choose = router(scenario.router)(problem, placement)
    empty = load_of(problem, placement)
    times = Times(problem)
    chains: dict[int, Chain] = {}
    for client in {request.client for request in scenario.requests}:
        choice = choose(empty, client)
        if choice is None or math.isinf(choice.wait_s):
            raise NoRouteError("no chain of this placement can hold even one session")
        chains[client] = choice.chain
    return Result(
        fidelity="a",
        seed=scenario.seed,
        served=tuple(
            _served(scenario, times, request, chains[request.client])
            for request in scenario.requests
        ),
        placement=placement,
        history=((0.0, placement),),
        facts=_facts(scenario, placement),
    )


def _served(scenario: Scenario, times: Times, request: Request, chain: Chain) -> Served:
    client = request.client
    prompt_s = times.prompt_s(client, chain, request.tokens_in) * request.work
    steps_s = (request.tokens_out - 1) * times.step_s(client, chain) * request.work
    first_s = request.at_s + scenario.setup_s + prompt_s
    return Served(
        client=client,
        at_s=request.at_s,
        tokens_in=request.tokens_in,
        tokens_out=request.tokens_out,
        start_s=request.at_s,
        first_s=first_s,
        end_s=first_s + steps_s,
        chain=chain,
    )


def _facts(scenario: Scenario, placement: Placement) -> dict[str, float]:
    problem = scenario.problem
    together = predict(problem, placement)
    facts = {
        "bound_step_s": request_bound_s(problem),
        "in_step_tokens_per_s": together.tokens_per_s,
        "in_step_step_s": together.step_s,
        "in_step_unplaced": together.unplaced,
    }
    rate = problem.workload.requests_per_s
    chains = composed(problem, placement)
    if rate > 0 and chains:
        low_s, high_s = mean_response_s(chains, rate)
        facts |= {"dispatch_response_s_low": low_s, "dispatch_response_s_high": high_s}
    return facts
