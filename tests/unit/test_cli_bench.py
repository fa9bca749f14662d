"""`shoal bench`: tables of scripts are read, failures are told, figures are medians."""

import pytest

from shoal.base.errors import ConfigError
from shoal.cli import bench as bench_command
from shoal.cli.app import run
from shoal.cli.benching import BASELINE, _rows, hop_ms
from shoal.cli.suite import SuiteRow, parse_tables, run_suite, scripts, suite_folder
from shoal.hf.generation import Speed

OUTPUT = """warming up
| model | way | threads | tokens_per_s | share |
|---|---|---|---|---|
| tiny | 1 process | 1 | 521.003 | 1.000 |
| tiny | 2 servers | 1 | 242.228 | 0.465 |
some words
| state_kib | hop_ms | note |
|---|---|---|
| 8 | 0.234 | - |
"""


def test_tables_are_read_out_of_what_a_script_prints():
    assert parse_tables("x", OUTPUT) == [
        SuiteRow(
            benchmark="x",
            case="tiny, 1 process, threads 1",
            figures={"tokens_per_s": "521.003", "share": "1.000"},
        ),
        SuiteRow(
            benchmark="x",
            case="tiny, 2 servers, threads 1",
            figures={"tokens_per_s": "242.228", "share": "0.465"},
        ),
        SuiteRow(benchmark="x", case="state_kib 8, -", figures={"hop_ms": "0.234"}),
    ]
    assert parse_tables("x", "nothing here") == []


@pytest.fixture
def folder(tmp_path):
    """Two benchmarks, one of which fails, and a part of them."""
    head = 'import sys\nassert sys.argv[1:] == ["--quick", "--no-write"]\nOPTION = "--quick"\n'
    (tmp_path / "good.py").write_text(head + f"print({OUTPUT!r})\n")
    (tmp_path / "bad.py").write_text(head + "sys.exit('no swarm today')\n")
    (tmp_path / "part.py").write_text("1 / 0\n")
    return tmp_path


def test_a_suite_goes_on_after_a_failure(folder):
    told = []
    rows, failures = run_suite(
        scripts(folder), is_quick=True, is_written=False, progress=lambda *now: told.append(now)
    )
    assert {row.benchmark for row in rows} == {"good"}
    assert failures == {"bad": "no swarm today"}
    assert told == [("bad", 0, 2), ("good", 1, 2), ("done", 2, 2)]


def test_benchmarks_are_chosen_by_name(folder):
    assert [path.stem for path in scripts(folder, ["good"])] == ["good"]
    with pytest.raises(ConfigError, match="no benchmark 'part'; there are: bad, good"):
        scripts(folder, ["part"])


def test_this_checkout_has_a_suite():
    folder = suite_folder()
    assert folder is not None
    assert {"hop", "decode"} <= {path.stem for path in scripts(folder)}


def test_the_suite_in_one_table(folder, capsys, monkeypatch):
    monkeypatch.setattr(bench_command, "suite_folder", lambda: folder)
    assert run(["bench", "--quick"]) == 1
    said = capsys.readouterr()
    assert "tokens_per_s 521.003, share 1.000" in said.out
    assert "bad failed: no swarm today" in said.err
    assert run(["bench", "--quick", "--only", "good", "--json"]) == 0


def test_without_a_checkout_a_model_is_needed(capsys, monkeypatch):
    monkeypatch.setattr(bench_command, "suite_folder", lambda: None)
    assert run(["bench"]) == 2
    assert "give a MODEL" in capsys.readouterr().err
    assert run(["bench", "m", "--only", "hop"]) == 2
    assert "leave MODEL out" in capsys.readouterr().err


def speed(tokens_per_s):
    return Speed(time_to_first_token_s=0.5, tokens_per_s=tokens_per_s)


def test_figures_are_medians_beside_the_baseline():
    rows = _rows(
        {
            BASELINE: [speed(100.0), speed(90.0), speed(200.0)],
            "shoal, 1 server": [speed(50.0), speed(40.0), speed(60.0)],
            "shoal, 2 servers": [speed(40.0), speed(40.0), speed(40.0)],
        }
    )
    assert [(row.tokens_per_s, row.lowest, row.highest, row.share) for row in rows] == [
        (100.0, 90.0, 200.0, 1.0),
        (50.0, 40.0, 60.0, 0.5),
        (40.0, 40.0, 40.0, 0.4),
    ]
    assert hop_ms(rows) == pytest.approx(5.0)
    assert hop_ms(rows[:2]) is None
    (alone,) = _rows({"shoal, 1 server": [speed(50.0)]})
    assert alone.share is None
