"""The study of rings holds what it promises."""

from __future__ import annotations

import pytest

from shoal.lab.study import Task
from shoal.lab.study_list import study
from shoal.lab.study_ring import SPLITS, case_of


@pytest.mark.slow
def test_a_ring_beats_what_was_published_at_two_and_three_nodes():
    report = study("ring").run(Task(seeds=1, is_quick=True))
    assert [check.name for check in report.checks if not check.holds] == []
    rows = report.tables()["rings of equal nodes"]
    assert len(rows) == 9
    assert any(row.has(nodes="3", samples="3") for row in rows)


def test_splits_cover_all_blocks_and_balance_the_head():
    for shape, splits in SPLITS.items():
        assert [len(one) for one in splits] == [1, 2, 3, 4, 5]
        assert len({sum(one) for one in splits}) == 1
        for one in splits[1:]:
            case = case_of(shape, one, 1)
            times = [stage.at(1) for stage in case.times().stages]
            assert max(times) <= sum(times) / len(times) + case.block.at(1)
