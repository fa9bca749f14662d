"""What every rule of placement and every rule of routing does: one suite for all."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span
from shoal.plan.place.anneal import place_anneal
from shoal.plan.placement import Placement, check_placement, uncovered
from shoal.plan.policies import PLACERS, ROUTERS, SOLVED_PLACERS, placer, router
from shoal.plan.route.contract import Active, load_of
from tests.unit.plan_problems import check_route, placements, problems, simple

QUICK = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)

placers = pytest.mark.parametrize("name", [*PLACERS, *SOLVED_PLACERS])
routers = pytest.mark.parametrize("name", list(ROUTERS))


def place(name, problem, seed=0):
    if name == "anneal":
        return place_anneal(problem, random.Random(seed), moves=200)
    return placer(name)(problem, random.Random(seed))


@placers
@given(data=st.data())
@QUICK
def test_a_placement_covers_all_blocks_and_fits_or_says_it_cannot(name, data):
    # The exact rule plans for hub prices only, and takes long where others don't.
    limits = {"flow": "hub", "servers_max": 3, "blocks_max": 4} if name == "milp" else {}
    problem = data.draw(problems(**limits))
    try:
        placement = place(name, problem)
    except NoRouteError:
        return
    check_placement(problem, placement)
    assert uncovered(problem, placement.spans) == []


@placers
@given(data=st.data())
@QUICK
def test_the_same_seed_gives_the_same_placement(name, data):
    problem = data.draw(problems(flow="hub", clients_max=1, servers_max=4, blocks_max=4))
    try:
        placement = place(name, problem, seed=3)
    except NoRouteError:
        return
    assert place(name, problem, seed=3) == placement


@placers
def test_enough_memory_everywhere_is_always_placed(name):
    problem = simple([20 * 10**9] * 3, 6, weight=10**9, cache=10**6, sessions=2)
    placement = place(name, problem)
    assert uncovered(problem, placement.spans) == []


@placers
@pytest.mark.parametrize("memory", [[], [0, 0], [5, 5]])
def test_too_little_memory_is_an_error_with_the_reason(name, memory):
    problem = simple(memory, 4)
    with pytest.raises(NoRouteError, match=r"memory|sessions"):
        place(name, problem)


def test_unknown_rules_are_refused():
    with pytest.raises(ConfigError, match=r"no rule of placement .*'best'.*petals.*milp"):
        placer("best")
    with pytest.raises(ConfigError, match=r"no rule of routing .*'best'.*wsrr"):
        router("best")


def test_without_a_solver_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    for name in ("program", "milp"):
        monkeypatch.delitem(sys.modules, f"shoal.plan.place.{name}", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[plan\]'"):
        placer("milp")


@routers
@given(data=st.data())
@QUICK
def test_a_chain_covers_all_blocks_on_servers_that_host_them(name, data):
    problem = data.draw(problems(exits=data.draw(st.sampled_from(["end", "anywhere"]))))
    placement = data.draw(placements(problem))
    client = data.draw(st.integers(0, problem.num_clients - 1))
    try:
        choose = router(name)(problem, placement)
        load = load_of(problem, placement)
        choice = choose(load, client)
    except NoRouteError:
        return
    assert choice is not None
    assert choose(load, client) == choice
    assert choice.wait_s >= 0
    # Petals always runs to the end of a span, whatever the problem says.
    rule = replace(problem, exits="end") if name == "petals" else problem
    check_route(rule, placement, choice.chain)


@routers
@given(data=st.data())
@QUICK
def test_sessions_that_need_not_wait_fit_together(name, data):
    problem = data.draw(problems(clients_max=1))
    placement = data.draw(placements(problem))
    try:
        choose = router(name)(problem, placement)
        sessions: list[Active] = []
        for number in range(6):
            choice = choose(load_of(problem, placement, sessions, now_s=1.0), 0)
            if choice is None or choice.wait_s > 0:
                break
            sessions.append(Active(choice.chain, 10.0 + number))
            assert min(load_of(problem, placement, sessions).free) >= 0
    except NoRouteError:
        return


@routers
def test_uncovered_blocks_are_an_error_that_names_them(name):
    problem = simple([100, 100], 6)
    placement = Placement(spans=(Span(0, 2), Span(3, 6)))
    with pytest.raises(NoRouteError, match=r"\[2,3\)") as caught:
        router(name)(problem, placement)(load_of(problem, placement), 0)
    assert caught.value.missing == ((2, 3),)
