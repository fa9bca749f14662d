"""Studies come out as published or measured before: the acceptance figures, with tolerances."""

from __future__ import annotations

import pytest

from shoal.base.errors import ConfigError
from shoal.lab.study import Report, Task, between, falling, mean, within
from shoal.lab.study_acceptance import (
    ACCEPTANCE,
    acceptance_content,
    acceptance_markdown,
    judged,
)
from shoal.lab.study_churn import churned
from shoal.lab.study_exactness import bad_example
from shoal.lab.study_failures import EVENT_KINDS
from shoal.lab.study_kept import Kept, Made
from shoal.lab.study_list import STUDIES
from shoal.lab.study_maps import load_map
from shoal.lab.study_swarms import scattered_swarm


def assert_holds(report: Report) -> None:
    """Every check of the report."""
    assert report.checks
    missed = [f"{check.name}; found {check.found}" for check in report.checks if not check.holds]
    assert not missed


def shows(report: Report, *numbers: int) -> bool:
    """Whether each of these acceptance figures finds its checks there."""
    return all(ACCEPTANCE[number - 1].checks(report.checks) for number in numbers)


def quick(name: str, seeds: int | None = None) -> Report:
    study = STUDIES[name]
    return study.run(Task(seeds=seeds or study.quick_seeds, is_quick=True))


def test_maps_are_the_published_ones():
    for key, places in (("topozoo/Abvt", 22), ("topozoo/Bellcanada", 48)):
        network = load_map(key)
        assert network.num_places == places
        fibre, published = (network.rtt_s(0, 5, delay) for delay in ("fibre", "published"))
        assert fibre == pytest.approx(2.95 * published)
        assert network.rtt_s(5, 0, "fibre") == pytest.approx(fibre)
        assert fibre > 0
    with pytest.raises(ConfigError, match="has no map 'topozoo/Atlantis'"):
        load_map("topozoo/Atlantis")


def test_checks_say_what_was_expected():
    assert within("a", 1.05, 1.0, 0.1).holds
    assert not within("a", 1.2, 1.0, 0.1).holds
    assert between("a", 0.5, 0.4, 0.6).holds
    assert falling("a", [3, 2, 2.01], slack=0.02).holds
    assert not falling("a", [3, 2, 2.1], slack=0.02).holds
    with pytest.raises(ConfigError, match="more seeds"):
        mean([])


def test_order_and_numbers_carry_the_gain():
    report = quick("bprr-ablation")
    assert_holds(report)
    assert shows(report, 3, 4)


def test_with_their_constants_the_published_table_comes_out():
    report = quick("bprr-scattered", seeds=2)
    assert shows(report, 1, 2)
    for rate, tokens, published in (("0.1", "64", 1.41), ("0.5", "128", 0.92)):
        row = report.row("s/token", map="BellCanada", **{"req/s": rate, "tokens": tokens})
        assert row.value("proposed with their constants") == pytest.approx(published, rel=0.03)
        assert row.value("proposed in their simulator", "published") == published


@pytest.mark.slow
def test_the_scattered_set_is_as_published_and_less_without_constants():
    assert_holds(quick("bprr-scattered"))


def test_the_clustered_set_runs_and_the_proposal_wins_everywhere():
    report = quick("bprr-clustered", seeds=1)
    assert len(report.rows) == 12
    assert all(row.value("reduction, model only") > 0.1 for row in report.rows)


def test_the_example_in_which_cgbp_is_as_bad_as_one_likes():
    rows, checks = bad_example()
    assert all(check.holds for check in checks)
    assert rows[0].value("whole, s") == pytest.approx(rows[0].value("optimum, s", "published"))


@pytest.mark.slow
def test_annealing_is_near_the_optimum_and_both_programs_agree():
    report = quick("exactness", seeds=1)
    assert_holds(report)
    assert shows(report, 5, 6)


def test_one_swarm_with_churn_answers_faster_when_servers_place_for_latency():
    swarm = scattered_swarm(30, 1)
    petals, latency = (churned(swarm, 20, rule, 1) for rule in ("petals", "latency"))
    pairs = zip(petals.steps_s, latency.steps_s, strict=True)
    both = [(old, new) for old, new in pairs if old is not None and new is not None]
    assert len(both) > 20
    assert sum(new for _, new in both) < sum(old for old, _ in both)
    assert latency.rows_per_s < petals.rows_per_s, "what it costs"
    assert latency.outage < 0.15


@pytest.mark.slow
def test_placing_for_latency_is_faster_by_about_what_was_measured_before():
    assert_holds(quick("churn"))


@pytest.mark.parametrize("name", ["chains", "backoff"])
def test_waiting_and_composing_are_as_measured_before(name):
    assert_holds(quick(name, seeds=2))


@pytest.mark.slow
def test_a_dispatcher_beats_better_placement_under_load():
    assert_holds(quick("dispatch"))


def test_who_is_killed_costs_little_and_who_is_silent_costs_a_deadline():
    report = quick("failures", seeds=1)
    assert_holds(report)
    killed, silent = (
        report.row("failures", p="1e-2", **{"servers are": death}) for death in EVENT_KINDS
    )
    assert killed.value("ours, steps/s") > silent.value("ours, steps/s")
    assert 0 < killed.value("ours, ms lost per repair") < 500


def test_throughput_is_near_what_nothing_can_beat():
    assert_holds(quick("helix"))


def test_networks_are_as_published_between_relaying_and_pushing():
    report = quick("wan")
    assert_holds(report)
    far = report.row("steps per second", network="100 Mbit/s, 100 ms", tokens="128")
    assert far.value("push, 0.3 ms a hop, steps/s") > far.value("hub, 0.3 ms a hop, steps/s")


def test_every_acceptance_figure_has_a_verdict():
    assert [one.number for one in ACCEPTANCE] == list(range(1, 14))
    assert all(one.study in STUDIES or one.elsewhere for one in ACCEPTANCE)
    good, bad = between("the bad example: a", 1, 0, 2), between("programs: b", 2, 0, 1)
    made = Made(date="2026-11-21", commit="abc1234")
    verdicts = judged({"exactness": Kept(checks=(good, bad), seeds=5, is_quick=True, made=made)})
    words = {one.figure.number: one.word for one in verdicts}
    assert (words[5], words[6], words[7], words[13]) == ("DIFFERS", "holds", "not run", "not here")
    text = acceptance_markdown(verdicts)
    assert "| exactness | abc1234, 2026-11-21, 5 seeds, quick | 0 of 1 | DIFFERS |" in text
    assert text.endswith("* 5 DIFFERS: programs: b: 0 to 1; found 2")
    figures = acceptance_content(verdicts)["figures"]
    assert figures[4]["run"]["commit"] == "abc1234"
    assert figures[6]["run"] is None


def test_the_gain_outlives_the_assumptions():
    report = quick("realism", seeds=3)
    assert_holds(report)
    waits = [row.value("proposed, wait s") for row in report.rows]
    assert waits[2] > waits[0], "reserving for the longest answer has its price"
