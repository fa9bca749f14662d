"""`shoal simulate SCENARIO`: files are read or refused by line, figures and tables written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.base.errors import ConfigError
from shoal.cli.app import run
from shoal.cli.simulate_file import read_scenario
from shoal.lab.sim_scenario import Event

ROOT = Path(__file__).resolve().parents[2]
EVENING = ROOT / "examples" / "scenarios" / "evening.toml"

CLUSTER = """
[model]
blocks = 8
params_per_block = 10e6
hidden_size = 512
kv_heads = 4
head_size = 64

[workload]
tokens_in = 20
tokens_out = 10
sessions = 2
{workload}

[links]
rtt_ms = 20
rate = "100Mbit/s"

[[servers]]
name = "one"
memory = "300MB"
decode_ms = {{ 1 = 2.0, 4 = 2.5 }}
prefill_ms = 0.1
{blocks}

[[servers]]
name = "two"
count = 2
memory = "300MB"
decode_ms = 3.0
prefill_ms = 0.1

[simulation]
{simulation}
"""


def write(folder: Path, simulation: str = "", *, more: str = "", **parts: str) -> Path:
    path = folder / "scenario.toml"
    words = {"workload": "requests_per_s = 1.0", "blocks": "", "simulation": simulation} | parts
    path.write_text(CLUSTER.format(**words) + more, encoding="utf-8")
    return path


def test_the_example_runs_at_two_fidelities_and_writes_everything(tmp_path, capsys):
    arguments = ["simulate", str(EVENING), "--seeds", "2", "--out", str(tmp_path / "out")]
    assert run([*arguments, "--fidelity", "a", "--fidelity", "b", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["b"]["requests"] == 40
    assert figures["b"]["failed"] == 0
    assert figures["b"]["reload_bytes"] > 1e9
    assert figures["a"]["response_s_mean"] < figures["b"]["response_s_mean"]
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [
        "occupancy.png", "placement.png", "requests-a.csv", "requests-b.csv", "responses.png",
        "summary.json",
    ]  # fmt: skip
    rows = (tmp_path / "out" / "requests-b.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 81
    assert "gaming-" in rows[1]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert summary["simulated"] is True
    assert summary["seeds"] == [0, 1]


def test_the_real_code_runs_a_small_file(tmp_path, capsys):
    path = write(tmp_path, 'requests = 4\nplacer = "cgbp"')
    assert run(["simulate", "run", str(path), "--fidelity", "c", "--fidelity", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("response, s: mean") for line in lines)
    assert next(line for line in lines if line.startswith("requests")).split()[1:] == ["4", "4"]
    assert next(line for line in lines if line.startswith("not answered")).split()[2:] == ["0", "0"]


def test_a_file_says_what_happens_when_and_to_whom(tmp_path):
    events = '[[events]]\nat_s = 5\nkind = "kill"\nserver = "two-2"\n'
    listed = "[[requests]]\nat_s = 1.5\n[[requests]]\nat_s = 2\ntokens_out = 3\nclient = 1\n"
    path = write(
        tmp_path, 'router = "gca-jffc"\nmoves = "petals"\nwhile_loading = "down"',
        more=events + listed, workload="",
    )  # fmt: skip
    story = read_scenario(path).scenario(7)
    assert story.events == (Event(at_s=5.0, kind="kill", server=2),)
    assert [(one.at_s, one.tokens_in, one.tokens_out) for one in story.requests] == [
        (1.5, 20, 10), (2.0, 20, 3),
    ]  # fmt: skip
    assert story.seed == 7
    assert story.moves.is_down
    assert story.moves.reload.seconds(0, 12_500_000) == pytest.approx(1.0)


def test_requests_come_from_a_trace(tmp_path):
    trace = "at_s,tokens_in,tokens_out\n0,5,6\n1.5,7,8\n2,1,1\n"
    (tmp_path / "trace.csv").write_text(trace, encoding="utf-8")
    path = write(tmp_path, 'trace = "trace.csv"\nrequests = 2', workload="")
    requests = read_scenario(path).scenario(0).requests
    assert [(one.at_s, one.tokens_in, one.tokens_out) for one in requests] == [
        (0.0, 5, 6), (1.5, 7, 8),
    ]  # fmt: skip
    (tmp_path / "trace.csv").write_text(trace + "x,1,1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"trace.csv, line 5: needs numbers"):
        read_scenario(write(tmp_path, 'trace = "trace.csv"', workload=""))


def test_seeds_draw_other_requests_and_the_same_again(tmp_path):
    read = read_scenario(write(tmp_path, 'arrivals = "bursty"\nlengths_sigma = 0.5'))
    assert read.scenario(1).requests == read.scenario(1).requests
    assert read.scenario(1).requests != read.scenario(2).requests
    assert len({one.tokens_out for one in read.scenario(1).requests}) > 3
    steady = read_scenario(write(tmp_path, 'arrivals = "steady"')).scenario(0).requests
    assert [one.at_s for one in steady[:3]] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("simulation", "parts", "text"),
    [
        ('rooter = "wsrr"', {}, r"line 34: simulation.rooter: unknown key; did you mean router"),
        ('router = "wsr"', {}, r"line 34: simulation.router: 'wsr' is unknown; did you mean"),
        ("variation = 2.0", {}, r'variation: goes with arrivals = "bursty"'),
        ("", {"workload": ""}, "when do requests come"),
        ('placer = "cgbp"', {"blocks": 'blocks = "0:4"'}, "leave one of the two out"),
        ('trace = "none.csv"', {}, "can't read"),
        (
            "",
            {"more": '[[events]]\nat_s = 1\nkind = "kill"\nserver = "to"\n'},
            "choose one, two-1, two-2",
        ),
        ("", {"more": '[[events]]\nat_s = 1\nkind = "die"\nserver = "one"\n'}, "'die' is unknown"),
        ("", {"more": "[[requests]]\nat_s = 1\nclient = 2\n"}, "not between 1 and 1"),
    ],
)
def test_nonsense_is_told_with_its_line(tmp_path, simulation, parts, text):
    with pytest.raises(ConfigError, match=text):
        read_scenario(write(tmp_path, simulation, **parts))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["simulate", "nothing.toml"], "can't read nothing.toml"),
        (["simulate", "caos"], "No such command 'caos'"),
        (["simulate", str(EVENING), "--fidelity", "d"], "no fidelity is called 'd'"),
    ],
)
def test_errors_are_one_line(capsys, arguments, text):
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
