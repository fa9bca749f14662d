"""Random schedules of failures; the runs repeat; what fails is shrunk; the command."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from shoal.cli.app import make_app
from shoal.lab import campaign, chaos, faults
from shoal.lab.campaign import quiet, run_digest, run_seed, run_seeds, same_failure
from shoal.lab.chaos import draw_plan, run_plan, shrink

FAST_SEEDS = 60
BATCH = 100

DIGEST = """
from shoal.lab.campaign import run_digest
from shoal.lab.chaos import draw_plan
for seed in ({seeds}):
    print(*run_digest(draw_plan(seed)))
"""


def check(seeds):
    with quiet():
        failures = [outcome.failure for outcome in run_seeds(seeds) if outcome.failure]
    assert not failures, "\n".join(
        f"{failure.error}\nshoal simulate chaos --first {failure.seed} --seeds 1\n{failure.shrunk}"
        for failure in failures
    )


@pytest.mark.parametrize("first", range(0, FAST_SEEDS, 20))
def test_schedules(first):
    check(range(first, first + 20))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, BATCH))
def test_many_schedules(first):
    check(range(first, first + BATCH))


@pytest.mark.parametrize("seeds", ["3, 8, 21"])
def test_a_run_is_the_same_in_every_process(seeds):
    code = DIGEST.format(seeds=seeds)
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0].splitlines())) == 3


def test_the_digest_sees_a_difference():
    with quiet():
        plan = draw_plan(3)
        assert run_digest(plan)[0] != run_digest(chaos.replace(plan, seed=4))[0]


# --- a bug on purpose -----------------------------------------------------------------


@pytest.fixture
def a_lying_server(monkeypatch):
    """Faults of kind "slow" make the server compute nonsense: a bug that chaos must find."""
    begin = faults.Injector.begin

    async def lying_begin(self, fault):
        if fault.kind == "slow":
            server = self._swarm.servers[fault.target]
            server.fault = lambda call: "wrong"
            return faults._call(setattr, server, "fault", None)
        return await begin(self, fault)

    monkeypatch.setattr(faults.Injector, "begin", lying_begin)


def find_failing_seed():
    for seed in range(200):
        plan = draw_plan(seed)
        if len(plan.faults) < 4 or all(fault.kind != "slow" for fault in plan.faults):
            continue
        try:
            run_plan(plan)
        except Exception as error:  # noqa: BLE001 - its type is what is looked at
            return plan, error
    pytest.fail("no seed shows the bug")


@pytest.mark.usefixtures("a_lying_server")
def test_a_bug_is_found_and_shrunk():
    with quiet():
        plan, error = find_failing_seed()
        assert type(error).__name__ in ("WrongText", "BrokenInvariant")
        shrunk = shrink(plan, same_failure(error))
        assert [fault.kind for fault in shrunk.faults] == ["slow"]
        assert len(shrunk.users) == 1
        assert len(shrunk.users[0].script) <= 3
        with pytest.raises(type(error)):
            run_plan(shrunk)


@pytest.mark.usefixtures("a_lying_server")
def test_a_failing_seed_prints_how_to_repeat_it():
    with quiet():
        plan, _ = find_failing_seed()
        outcome = run_seed(plan.seed)
    assert outcome.result is None
    command = ["simulate", "chaos", "--first", str(plan.seed), "--seeds", "1"]
    result = CliRunner().invoke(make_app(), command)
    assert result.exit_code == 1
    assert f"seed {plan.seed} failed: {outcome.failure.error}" in result.stderr
    assert " ".join(["shoal", *command]) in result.stderr
    assert str(outcome.failure.shrunk) in result.stderr
    assert result.stdout == "1 schedules, 0 rows checked, 0 repairs, 1 failures\n"


def test_shrinking_ends_when_its_runs_are_used_up(monkeypatch):
    monkeypatch.setattr(campaign, "SHRINK_RUNS_MAX", 0)
    assert not same_failure(ValueError())(draw_plan(0))


# --- the command -----------------------------------------------------------------------


def test_command_sums_up():
    result = CliRunner().invoke(make_app(), ["simulate", "chaos", "--seeds", "4", "--jobs", "1"])
    assert result.exit_code == 0
    assert result.stderr == ""
    words = result.stdout.split()
    assert words[:2] == ["4", "schedules,"]
    assert int(words[2]) > 0
    assert words[-2:] == ["0", "failures"]


def test_processes_give_the_same_outcomes():
    def key(outcome):
        return outcome.seed

    with quiet():
        here = sorted(run_seeds(range(4)), key=key)
        there = sorted(run_seeds(range(4), jobs=2), key=key)
    assert here == there


def test_whoever_stops_listening_stops_the_processes():
    outcomes = run_seeds(range(10_000), jobs=2)
    assert next(outcomes).failure is None
    outcomes.close()
