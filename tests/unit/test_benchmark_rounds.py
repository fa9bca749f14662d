"""Which rounds of a benchmark count: the judgement, the turns, and the system's accounts."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROUNDS = Path(__file__).parents[2] / "benchmarks" / "rounds.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_rounds", ROUNDS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


rounds: Any = _load()


def times(ran_s: float, waited_s: float) -> Any:
    return rounds.CpuTimes(loop_s=0.0, compute_s=ran_s, waited_s=waited_s)


@pytest.mark.parametrize(
    ("why", "waited_s", "others_s", "stolen_s", "lost_s"),
    [
        ("nobody waited", [0.0], 8.0, 0.0, 0.0),
        ("lost a tenth to strangers", [1.0], 4.0, 0.0, 1.0),
        ("waited for its own kind only", [5.0, 4.0, 0.3], 0.0, 0.0, 0.0),
        ("strangers cost no more than they ran", [2.0], 0.4, 0.0, 0.4),
        ("losses add up where one depends on the other", [0.3, 0.3], 4.0, 0.0, 0.6),
        ("who hardly computes costs little", [0.03], 4.0, 0.0, 0.03),
        ("who hardly computes is waited for", [0.6], 4.0, 0.0, 0.6),
        ("the hypervisor took it", [0.0], 0.0, 1.0, 1.0),
    ],
)
def test_what_others_cost_a_round(
    why: str, waited_s: list[float], others_s: float, stolen_s: float, lost_s: float
) -> None:
    workers = {f"worker {number}": times(1.0, each_s) for number, each_s in enumerate(waited_s)}
    usage = rounds.Usage(wall_s=10.0, workers=workers, others_s=others_s, stolen_s=stolen_s)
    assert usage.lost_s == pytest.approx(lost_s), why
    assert rounds.Round(value=1.0, usage=usage).is_disturbed == (lost_s > 0.5), why
    assert usage.as_dict()["lost_share"] == pytest.approx(lost_s / 10.0)


def test_between_two_readings() -> None:
    before = rounds.Reading(at_s=1.0, busy_s=10.0, stolen_s=0.0, processes={7: times(2.0, 0.5)})
    after = rounds.Reading(
        at_s=3.0, busy_s=13.5, stolen_s=0.25, processes={7: times(3.0, 0.75), 8: times(1.5, 0.0)}
    )
    usage = rounds.usage_between(before, after, {"server": 7})
    assert (usage.wall_s, usage.others_s, usage.stolen_s) == (2.0, 1.0, 0.25)
    assert usage.workers == {"server": times(1.0, 0.25)}
    with pytest.raises(SystemExit, match="ended during a round: client"):
        rounds.usage_between(before, after, {"client": 9})


def test_family() -> None:
    pairs = [(1, 0), (5, 1), (6, 5), (7, 6), (8, 1)]
    assert rounds.family(5, pairs) == {5, 6, 7}


def _way(values: list[float], log: list[float]) -> Any:
    async def measure() -> float:
        log.append(values[0])
        return values.pop(0)

    return rounds.Way(workers={"a": 1}, measure=measure)


def test_ways_take_turns_and_the_first_turn_is_thrown_away() -> None:
    log: list[float] = []
    ways = {"a": _way([1.0, 2.0, 3.0], log), "b": _way([10.0, 20.0, 40.0], log)}
    taken = asyncio.run(rounds.take_rounds(ways, 2, _accounts([False] * 4)))
    assert log == [1.0, 10.0, 2.0, 20.0, 3.0, 40.0]
    assert (taken["a"].median, taken["b"].median) == (2.5, 30.0)
    assert taken["b"].over(taken["a"]) == 12.0
    assert taken["a"].cells() == {"rounds": 2, "dropped": 0}


def test_disturbed_rounds_are_replaced() -> None:
    taken = asyncio.run(
        rounds.take_rounds(
            {"a": _way([0.0, 1.0, 2.0, 3.0, 4.0], [])}, 2, _accounts([True, False, True, False])
        )
    )["a"]
    assert taken.kept == [2.0, 4.0]
    assert taken.cells() == {"rounds": 2, "dropped": 2}
    assert [one["is_dropped"] for one in taken.details()] == [True, False, True, False]


def test_without_an_undisturbed_round_there_is_no_figure() -> None:
    taken = asyncio.run(rounds.take_rounds({"a": _way([1.0] * 4, [])}, 1, _accounts([True] * 3)))[
        "a"
    ]
    assert taken.median is None
    assert taken.over(taken) is None
    assert taken.cells() == {"rounds": 0, "dropped": rounds.ROUNDS_PER_WANTED}


def test_systems_without_accounts(tmp_path: Path) -> None:
    assert rounds.read_accounts(os.getpid(), tmp_path) is None
    taken = asyncio.run(rounds.take_rounds({"a": _way([1.0, 2.0], [])}, 1, lambda: None))["a"]
    assert (taken.median, taken.cells()["dropped"]) == (2.0, "unchecked")


def test_accounts_of_a_made_up_system(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 20 30 999 0 5 6 70 0 0\n")
    _process(tmp_path, 40, parent=1, name="me", threads={40: (1, 2), 41: (3, 4)})
    _process(tmp_path, 50, parent=40, name="a) b", threads={50: (5, 6)})
    _process(tmp_path, 60, parent=1, name="stranger", threads={60: (9, 9)})
    (tmp_path / "meminfo").write_text("not a process\n")
    reading = rounds.read_accounts(40, tmp_path)
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    assert reading.busy_s == pytest.approx(161 * tick_s)
    assert reading.stolen_s == pytest.approx(70 * tick_s)
    assert reading.processes == {
        40: rounds.CpuTimes(loop_s=1.0, compute_s=3.0, waited_s=6.0),
        50: rounds.CpuTimes(loop_s=5.0, compute_s=0.0, waited_s=6.0),
    }


def test_accounts_without_waiting_times(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 20 30 999 0 5 6 70 0 0\n")
    _process(tmp_path, 40, parent=1, name="me", threads={40: (1, 2)})
    (tmp_path / "40" / "task" / "40" / "schedstat").unlink()
    assert rounds.read_accounts(40, tmp_path) is None


def _process(
    proc: Path, pid: int, *, parent: int, name: str, threads: dict[int, tuple[int, int]]
) -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 0 0\n")
    for thread, (ran_s, waited_s) in threads.items():
        folder = proc / str(pid) / "task" / str(thread)
        folder.mkdir(parents=True)
        (folder / "schedstat").write_text(f"{ran_s}000000000 {waited_s}000000000 3\n")


def _accounts(disturbed: list[bool]) -> Callable[[], Any]:
    """Readings in pairs around rounds in which the hypervisor took a lot, or nothing."""
    readings = []
    for is_disturbed in disturbed:
        for stolen_s in (0.0, 5.0 if is_disturbed else 0.0):
            readings.append(
                rounds.Reading(
                    at_s=len(readings) * 10.0,
                    busy_s=0.0,
                    stolen_s=stolen_s,
                    processes={1: times(0.0, 0.0)},
                )
            )

    def read() -> Any:
        return readings.pop(0)

    return read
