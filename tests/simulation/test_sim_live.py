"""Fidelity C beside A and B: the model and the real client and server tell the same story.

Tolerances: one session alone within 3 % of the cost model in its response time and 1 % in its
steps; under light load 5 % of the mean. Opening a session is what C says it is. What is left:
opening its links, chunks of prompts, and batches, which only C knows.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.lab.sim_analytic import simulate_analytic
from shoal.lab.sim_live import simulate_live
from shoal.lab.sim_scenario import Event, Moves, Reload, Request, draw_requests, poisson
from shoal.lab.sim_slots import simulate_slots
from shoal.lab.sim_swarm import cache_tokens_of, hidden_size_of
from shoal.plan.placement import Placement
from tests.unit.sim_cases import THIRDS, TOKENS_IN, TOKENS_OUT, scenario, swarm

OPENING_S = 0.041
"""A round trip to the farthest server of `swarm(3)`, with handling: no session opens sooner."""


@pytest.mark.parametrize("flow", ["hub", "push"])
def test_one_session_takes_the_same_at_all_fidelities(flow):
    story = scenario(swarm(flow=flow), 1.0)
    live = simulate_live(story).served[0]
    for simulate in (simulate_analytic, simulate_slots):
        known = simulate(replace(story, setup_s=live.wait_s)).served[0]
        assert live.chain == known.chain
        assert live.response_s == pytest.approx(known.response_s, rel=0.03)
        assert live.step_s == pytest.approx(known.step_s, rel=0.01)
    assert OPENING_S <= live.wait_s <= 3 * OPENING_S


def test_under_light_load_slots_and_the_real_code_agree():
    problem = swarm()
    rng = random.Random(3)
    requests = draw_requests(problem, poisson(rng, 0.1), 12, rng)
    story = replace(scenario(problem), requests=requests)
    live = simulate_live(story).summary()
    slots = simulate_slots(replace(story, setup_s=live["wait_s_mean"])).summary()
    for figure in ("response_s_mean", "response_s_p90", "step_s_mean"):
        assert live[figure] == pytest.approx(slots[figure], rel=0.05)
    assert live["failed"] == live["repairs"] == 0


def test_batches_make_steps_longer_than_alone_and_only_the_real_code_knows():
    story = scenario(swarm(), *([0.0] * 8))
    live, slots = simulate_live(story).summary(), simulate_slots(story).summary()
    assert live["step_s_mean"] > 1.02 * slots["step_s_mean"]
    assert live["step_s_mean"] < 1.5 * slots["step_s_mean"]


def test_a_killed_server_is_replaced_and_a_run_is_repeated_by_its_seed():
    problem = swarm(4)
    far = tuple(0.0 if one == 3 else 0.06 for one in range(4))
    rows = tuple((*row[:3], 0.06) for row in problem.links.server_rtt_s[:3])
    problem = replace(problem, links=replace(problem.links, server_rtt_s=(*rows, far)))
    story = scenario(
        problem, 0.0, 0.2, placement=Placement(spans=(*THIRDS, Span(4, 8))),
        events=(Event(at_s=1.0, kind="kill", server=1),),
    )  # fmt: skip
    live = simulate_live(story)
    assert [one.repairs for one in live.served] == [1, 1]
    assert {hop.server for hop in live.served[0].chain} == {0, 2, 3}
    assert live.summary()["failed"] == 0
    slots = simulate_slots(replace(story, setup_s=OPENING_S))
    assert live.summary()["response_s_mean"] == pytest.approx(
        slots.summary()["response_s_mean"], rel=0.15
    )
    assert live == simulate_live(story)


def test_an_outage_ends_when_the_blocks_are_loaded_again():
    story = scenario(
        swarm(), 0.0, moves=Moves(reload=Reload(bytes_per_s=4e9)),
        events=(
            Event(at_s=1.0, kind="leave", server=2), Event(at_s=2.0, kind="join", server=2),
        ),
    )  # fmt: skip
    done: list[tuple[int, int]] = []
    live = simulate_live(story, progress=lambda count, total: done.append((count, total)))
    assert live.outage_s == pytest.approx(2.0)
    assert live.served[0].has_ended
    assert live.served[0].end_s > 3.0
    assert done == [(1, 1)]
    assert max(sample.waiting + sample.running for sample in live.samples) == 1


def test_a_run_ends_at_its_limit_with_what_is_not_answered():
    story = scenario(swarm(), 0.0, events=(Event(at_s=0.1, kind="kill", server=0),))
    live = simulate_live(story, limit_s=20.0)
    assert not live.served[0].has_ended
    assert "time was over" in live.served[0].error


def test_job_sizes_are_refused():
    story = scenario(swarm())
    sized = Request(at_s=0, tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT, work=0.5)
    with pytest.raises(ConfigError, match="leave job sizes away"):
        simulate_live(replace(story, requests=(sized,)))


def test_sizes_follow_the_problem():
    problem = swarm(seats=8)
    placement = Placement(spans=THIRDS)
    assert hidden_size_of(problem) == 1024
    assert cache_tokens_of(problem, placement, 0) == 8 * (TOKENS_IN + TOKENS_OUT)
    assert cache_tokens_of(problem, placement.moved(0, None), 0) == 0


@pytest.mark.parametrize("while_loading", ["serve", "down"])
def test_servers_move_as_they_do_for_real_while_sessions_run(while_loading):
    problem = swarm(6)
    lopsided = Placement(spans=(*THIRDS, Span(0, 4), Span(0, 4), Span(0, 4)))
    moves = Moves(
        rule="petals", check_every_s=0.5, is_down=while_loading == "down",
        reload=Reload(fixed_s=1.0),
    )  # fmt: skip
    story = scenario(problem, *(0.7 * one for one in range(20)), placement=lopsided, moves=moves)
    live = simulate_live(story)
    assert live.moves == 2
    assert sorted(span for _, span in live.placement.hosted()) == sorted([*THIRDS, *THIRDS])
    assert live.summary()["failed"] == 0
    spans = live.placement.spans
    for hop in live.served[-1].chain:
        span = spans[hop.server]
        assert span is not None
        assert span.covers(hop.span)


def test_a_server_that_is_cut_off_keeps_its_blocks_and_is_missed_meanwhile():
    story = scenario(
        swarm(), 0.0, 2.0, detect_s=2.0,
        events=(Event(at_s=1.0, kind="cut", server=1), Event(at_s=9.0, kind="mend", server=1)),
    )  # fmt: skip
    for simulate in (simulate_slots, simulate_live):
        result = simulate(story)
        assert result.outage_s == pytest.approx(8.0)
        assert result.reload_bytes == 0
        assert result.summary()["failed"] == 0
        assert all(one.end_s > 9.0 for one in result.served)


def test_sessions_go_round_two_near_servers_and_not_across_the_world():
    """Each of the first two is nearer to the client, each of the last two to the other."""
    rtts, across_s = (0.05, 0.05, 0.06, 0.06), 0.1
    between = (
        (0.0, across_s, 0.08, 0.08), (across_s, 0.0, 0.08, 0.08),
        (0.08, 0.08, 0.0, 0.001), (0.08, 0.08, 0.001, 0.0),
    )  # fmt: skip
    problem = swarm(4)
    servers = tuple(
        replace(one, memory_bytes=8 * 10**9, num_blocks_max=None) for one in problem.servers
    )
    links = replace(problem.links, client_rtt_s=(rtts,), server_rtt_s=between)
    problem = replace(problem, servers=servers, links=links)
    west, east = Span(0, 6), Span(6, 12)
    story = scenario(problem, 0.0, 1.0, placement=Placement(spans=(west, east, west, east)))
    live = simulate_live(story)
    assert [[hop.server for hop in one.chain] for one in live.served] == [[2, 3], [2, 3]]
    zigzag = scenario(problem, 0.0, placement=Placement(spans=(west, east, None, None)))
    assert live.served[0].step_s < 0.8 * simulate_live(zigzag).served[0].step_s
