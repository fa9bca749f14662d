"""Scenarios by fidelity, in this process and in others: the same results in the same order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.base.errors import ConfigError
from shoal.lab.sim_runs import fidelity_of, simulate, simulate_all
from tests.unit.sim_cases import scenario, swarm


@pytest.mark.parametrize("word", ["a", "b", "c"])
def test_every_fidelity_has_a_simulation(word):
    result = simulate(scenario(swarm(), 0.0), fidelity_of(word))
    assert result.fidelity == word
    assert result.served[0].has_ended


def test_processes_give_what_one_gives_in_order():
    stories = [replace(scenario(swarm(seats=1), 0.0, 0.1 * seed), seed=seed) for seed in range(4)]
    alone = list(simulate_all(stories, "b"))
    assert [result.seed for result in alone] == [0, 1, 2, 3]
    assert list(simulate_all(stories, "b", jobs=2)) == alone


def test_there_is_no_other_fidelity():
    with pytest.raises(ConfigError, match="no fidelity is called 'd'"):
        fidelity_of("d")
