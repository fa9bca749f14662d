"""Studies come out as published or measured before: the acceptance figures, with tolerances."""

from __future__ import annotations

import pytest

from shoal.base.errors import ConfigError
from shoal.lab.study import Report, Task, between, falling, mean, within
from shoal.lab.study_list import STUDIES
from shoal.lab.study_maps import load_map


def assert_holds(report: Report) -> None:
    """Every check of the report."""
    assert report.checks
    missed = [f"{check.name}; found {check.found}" for check in report.checks if not check.holds]
    assert not missed


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
    assert_holds(quick("bprr-ablation"))


def test_with_their_constants_the_published_table_comes_out():
    report = quick("bprr-scattered", seeds=2)
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
