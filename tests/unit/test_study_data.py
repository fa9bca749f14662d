"""Recorded data for studies: what is read from files, and what is refused with a reason."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.cli.app import run
from shoal.lab.study import Task
from shoal.lab.study_data import NO_DATA, load_data, load_network, load_requests, load_rtts, stretch
from shoal.lab.study_list import STUDIES
from shoal.lab.study_real import (
    BEDS,
    DRAWN,
    PAGE_TOKENS,
    for_longest,
    live,
    made_for,
    on_hosts,
    real_rows,
    reserved,
)

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def hosts(path: Path, count: int) -> Path:
    """A table of so many hosts on a line, 10 ms from each to the next."""
    rows = [[10.0 * abs(one - other) for other in range(count)] for one in range(count)]
    return written(path, "\n".join(",".join(map(str, row)) for row in rows) + "\n")


def recorded(path: Path, count: int) -> Path:
    """One request a second in Azure's columns; every tenth far too long."""
    rng = random.Random(0)
    lines = [AZURE]
    for number in range(count):
        tokens_in = 9000 if number % 10 == 9 else rng.randrange(10, 300)
        when = f"2023-11-16 18:{number // 60:02}:{number % 60:02}.1234567"
        lines.append(f"{when},{tokens_in},{rng.randrange(5, 60)}")
    return written(path, "\n".join(lines) + "\n")


def test_round_trips_are_seconds_and_say_where_they_come_from(tmp_path: Path):
    path = hosts(tmp_path / "lab_rtt.csv", 4)
    unknown = load_rtts(path)
    assert unknown.num_hosts == 4
    assert unknown.rtt_s[0] == pytest.approx((0.0, 0.01, 0.02, 0.03))
    assert "no README.md beside it" in unknown.provenance
    written(tmp_path / "README.md", "# Data\n- `lab_rtt.csv`: measured in our lab, CC0.\n")
    known = load_rtts(path).provenance
    assert known.startswith("`lab_rtt.csv`: measured in our lab, CC0. SHA-256 ")


def test_a_table_with_names_leaves_out_whom_it_does_not_know(tmp_path: Path):
    text = "Source,a,b,lost,c\na,,10,,20\nb,11,,,30\nlost,1,,,\nc,21,31,,\n"
    known = load_rtts(written(tmp_path / "regions.csv", text))
    assert known.rtt_s == ((0.0, 0.01, 0.02), (0.011, 0.0, 0.03), (0.021, 0.031, 0.0))
    assert known.provenance.endswith("3 of 4 hosts, whose round trips are all known.")


def test_requests_of_azure_and_our_own_are_the_same(tmp_path: Path):
    azure = written(
        tmp_path / "azure.csv",
        f"{AZURE}\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:48.1805900,2,0\n"
        "2023-11-16 18:15:50.1805900,396,109\n",
    )
    own = written(tmp_path / "own.csv", "at_s,tokens_in,tokens_out\n7,374,44\n10.5,396,109\n")
    for path in (azure, own):
        requests = load_requests(path).requests
        assert [one.at_s for one in requests] == pytest.approx([0.0, 3.5])
        assert [(one.tokens_in, one.tokens_out) for one in requests] == [(374, 44), (396, 109)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1\n1\n", "no square table"),
        ("0\n", "no square table"),
        ("0,a\n1,0\n", "line 1: not all are numbers"),
        ("0,-1\n1,0\n", "line 1: round trips are milliseconds from 0 on"),
        ("0,nan\n1,0\n", "line 1: round trips are milliseconds from 0 on"),
        ("", "no square table"),
        ("x,a,b\na,,1\nb,,\n", "no square table"),
        ("x,a,b\na,,1\nb,one,\n", "line 2: not all are numbers"),
    ],
)
def test_bad_round_trips_are_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_rtts(written(tmp_path / "rtts.csv", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "has columns a, b; requests need TIMESTAMP"),
        ("", "without names"),
        (f"{AZURE}\nyesterday,1,1\n", "line 2"),
        (f"{AZURE}\n2023-11-16 18:15:46.0,one,1\n", "line 2"),
        (f"{AZURE}\n2023-11-16 18:15:46.0,1\n", "line 2"),
        ("at_s,tokens_in,tokens_out\nnan,1,1\n", "line 2: 'nan' is no time"),
        (f"{AZURE}\n", "no request with a prompt and an answer"),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_requests(written(tmp_path / "requests.csv", text))


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="can't read"):
        load_rtts(tmp_path / "none.csv")
    path = recorded(tmp_path / "requests.csv", 20)
    assert run(["study", "realism", "--quick", "--requests", str(path)]) == 2
    assert "add --rtts FILE" in capsys.readouterr().err


def test_a_stretch_keeps_order_and_lengths_and_takes_the_rate(tmp_path: Path):
    known = load_requests(recorded(tmp_path / "requests.csv", 60)).within(2048, 1024)
    assert len(known) == 54
    taken = stretch(known, 11, 0.1, random.Random(1))
    assert taken[0].at_s == 0.0
    assert taken[-1].at_s == pytest.approx(10 / 0.1)
    lengths = [(one.tokens_in, one.tokens_out) for one in known]
    start = lengths.index((taken[0].tokens_in, taken[0].tokens_out))
    assert lengths[start : start + 11] == [(one.tokens_in, one.tokens_out) for one in taken]
    with pytest.raises(ConfigError, match="100 requests are wanted, and 54 were recorded"):
        stretch(known, 100, 0.1, random.Random(1))


def test_reserving_for_the_longest_costs_waiting(tmp_path: Path):
    data = load_data(hosts(tmp_path / "rtts.csv", 30), recorded(tmp_path / "requests.csv", 200))
    assert data.rtts is not None
    assert data.requests is not None
    known = data.requests.within(2048, 1024)
    requests = stretch(known, 60, 0.5, random.Random(0))
    problem = made_for(on_hosts(data.rtts, BEDS[0], DRAWN, 0), known, 0.5)
    whole = Span(0, problem.num_blocks)
    assert problem.session_bytes(whole) < for_longest(problem).session_bytes(whole)
    longest, usual = (
        reserved(problem, requests, "proposed", 0, is_longest=is_longest).summary()
        for is_longest in (True, False)
    )
    assert longest["wait_s_mean"] > usual["wait_s_mean"]
    assert longest["failed"] == usual["failed"] == 0


def test_recorded_requests_are_answered_by_the_real_client_and_servers(tmp_path: Path):
    rtts = load_rtts(hosts(tmp_path / "rtts.csv", 30))
    known = load_requests(recorded(tmp_path / "requests.csv", 100)).within(2048, 1024)
    problem = made_for(on_hosts(rtts, BEDS[0], DRAWN, 0), known, 0.2)
    requests = stretch(known, 4, 0.2, random.Random(0))
    result = live(problem, requests, 0, PAGE_TOKENS)
    assert len(result.ended) == 4
    assert all(one.first_token_s > 0 for one in result.ended)


GRAPH = """NODES 3
label x y
a 1.0 2.0
b 1.0 2.0
c 1.0 2.0

EDGES 4
label src dest weight bw delay
e0 0 1 1 10000 1000
e1 1 0 1 10000 1000
e2 1 2 1 10000 500
e3 2 1 1 10000 500
"""


def test_a_map_has_the_delays_of_its_file(tmp_path: Path):
    network = load_network(written(tmp_path / "GTS-CE.graph", GRAPH))
    assert network.map.name == "GTS-CE"
    assert network.map.rtt_s(0, 2, "published") == pytest.approx(0.003)
    assert network.map.rtt_s(0, 2, "fibre") == pytest.approx(0.003 * 2.95)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NODES 3", "nodes", "no line `NODES COUNT`"),
        ("EDGES 4", "EDGES 9", "ends before 9 lines of EDGES"),
        ("e3 2 1", "e3 2 7", "is not `label from to"),
        ("e3 2 1", "e3 -1 1", "is not `label from to"),
        ("e2 1 2 1 10000 500", "e2 1 2 1 10000 nan", "is not `label from to"),
        ("e2 1 2 1", "e2 1 0 1", "is not connected"),
    ],
)
def test_bad_maps_are_refused(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_network(written(tmp_path / "x.graph", GRAPH.replace(old, new)))


def test_a_map_without_published_figures_is_refused(tmp_path: Path):
    data = load_data(None, None, written(tmp_path / "Atlantis.graph", GRAPH))
    with pytest.raises(ConfigError, match=r"name its file AboveNet\.graph, BellCanada\.graph, GTS"):
        STUDIES["bprr-scattered"].run(Task(seeds=1, is_quick=True, data=data))


def test_a_map_with_too_few_places_is_refused(tmp_path: Path):
    data = load_data(None, None, written(tmp_path / "GTS-CE.graph", GRAPH))
    with pytest.raises(ConfigError, match="map GTS-CE has 3 places, and 26 servers"):
        STUDIES["bprr-scattered"].run(Task(seeds=1, is_quick=True, data=data))


def ring(places: int) -> str:
    """A map of so many places in a circle, 100 microseconds from each to the next."""
    nodes = "".join(f"n{one} 0 0\n" for one in range(places))
    pairs = [(one, (one + step) % places) for one in range(places) for step in (1, -1)]
    edges = "".join(f"e{n} {a} {b} 1 10000 100\n" for n, (a, b) in enumerate(pairs))
    return f"NODES {places}\nlabel x y\n{nodes}\nEDGES {len(pairs)}\nheading\n{edges}"


def test_the_third_map_is_shown_where_the_user_has_it(tmp_path: Path):
    data = load_data(None, None, written(tmp_path / "GTS-CE.graph", ring(40)))
    report = STUDIES["bprr-scattered"].run(Task(seeds=2, is_quick=True, data=data))
    rows = [row for row in report.rows if row.has(map="GTS-CE")]
    assert len(rows) == 4
    assert all(row.value("proposed, model only") > 0 for row in rows)
    assert any("GTS-CE: the file's own delays" in note for note in report.notes)


def test_too_few_hosts_or_requests_are_refused_before_any_work(tmp_path: Path):
    few, many = hosts(tmp_path / "few.csv", 20), hosts(tmp_path / "many.csv", 30)
    short = recorded(tmp_path / "requests.csv", 20)
    for task, message in (
        (Task(seeds=1, data=load_data(few, None)), "20 hosts, and 26 servers and a client need 27"),
        (Task(seeds=1, data=load_data(many, short)), "a run needs 100"),
    ):
        with pytest.raises(ConfigError, match=message):
            STUDIES["realism"].run(task)


def test_without_data_nothing_is_invented():
    assert real_rows(Task(seeds=1, data=NO_DATA)) == ([], [])
