"""`shoal plan`: what it prints, draws and refuses."""

from __future__ import annotations

import ctypes
import json
import shlex
import sys
from pathlib import Path

import pytest
import typer

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.ids import PeerId, peer_text
from shoal.base.spans import Span, parse_span
from shoal.cli.app import make_app, run
from shoal.cli.c_output import c_prints_nothing
from shoal.cli.joining import SwarmChoice
from shoal.cli.plan_commands import move_lines
from shoal.cli.plan_file import Asked, read_cluster
from shoal.cli.plan_live import observed
from shoal.cli.plan_reader import read_table
from shoal.cli.plan_show import replicas_text
from shoal.cli.status import Seen
from shoal.discovery.records import Record
from shoal.net.address import parse_listen
from shoal.plan.proposal import propose
from shoal.plan.trying import Budget
from shoal.wire.fields import Coordinate

ROOT = Path(__file__).resolve().parents[2]
SITES = ROOT / "examples" / "clusters" / "sites.toml"
HOME = ROOT / "examples" / "clusters" / "home.toml"
WAN = ROOT / "examples" / "clusters" / "wan.toml"
ADDRESS = f"tcp://{peer_text(PeerId(bytes(32)))}@10.0.0.5:4001"
QUICK = ["--time-limit", "0.3"]


def serve_arguments(line):
    """What the real `shoal serve` makes of a printed line."""
    words = shlex.split(line.replace('"$ADDRESS"', ADDRESS).replace('"$MODEL"', "./model"))
    assert words[:2] == ["shoal", "serve"]
    command = typer.main.get_command(make_app()).commands["serve"]
    return command.make_context("serve", words[2:]).params


def test_a_plan_for_people(capsys):
    assert run(["plan", str(HOME), *QUICK]) == 0
    said = capsys.readouterr().out
    assert said.startswith("One server is faster: for one session gaming-pc takes")
    for word in ("placement by", "[0,32)", "where sessions run", "replicas", "nothing is faster"):
        assert word in said
    assert "estimates from data sheets" in said


def test_slow_ways_between_sites_are_planned_around(capsys):
    assert run(["plan", str(SITES), "--seed", "3", "--time-limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    flow = max(one["rows_per_s"] for one in found["rules"] if one["policy"].startswith("flow"))
    assert found["value"] >= flow
    linked, free = (found["figures"][name] for name in ("rows_per_s", "rows_unlinked_per_s"))
    assert linked <= free * (1 + 1e-6)
    assert any("ways" in line for line in found["advice"])


def test_what_libraries_in_c_print_is_not_in_the_answer(capfd):
    libc = ctypes.CDLL(None)
    with c_prints_nothing():
        libc.puts(b"from C")
    print("the answer")
    assert capfd.readouterr() == ("the answer\n", "")


def test_a_plan_as_json(capsys):
    assert run(["plan", str(WAN), "--json", "--objective", "pareto", "--time-limit", "0.1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["objective"] == "pareto"
    assert plan["front"]
    assert {server["name"] for server in plan["servers"]} == {"mac", "berlin", "warsaw"}
    assert sum(chain["sessions"] for chain in plan["chains"]) == plan["workload"]["sessions"]
    assert plan["present"]["step_s"] > 0
    assert {"load_bytes", "load_s", "is_seamless", "moves"} == set(plan["change"])
    assert len(plan["replicas"]) == 80


@pytest.mark.parametrize("path", sorted(HOME.parent.glob("*.toml")), ids=lambda path: path.stem)
def test_printed_commands_are_commands(path, capsys):
    assert run(["plan", str(path), "--commands", "--objective", "latency", *QUICK]) == 0
    lines = capsys.readouterr().out.splitlines()
    problem = read_cluster(read_table(path)).problem
    commands = [line for line in lines if not line.startswith("#")]
    assert commands
    assert sum(line.startswith("# on ") for line in lines) == len(commands)
    covered = set()
    for number, line in enumerate(commands):
        options = serve_arguments(line)
        span = parse_span(options["blocks"])
        covered |= set(range(span.start, span.end))
        parse_listen(options["listen"])
        assert options["cache_tokens"] >= 32
        assert bool(options["join"]) == (number > 0)
        SwarmChoice.parse(options["join"], None, None)
    assert covered == set(range(problem.num_blocks))


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_a_picture(name, tmp_path, capsys):
    path = tmp_path / name
    assert run(["plan", str(WAN), "--draw", str(path), *QUICK]) == 0
    head = b"\x89PNG" if path.suffix == ".png" else b"<?xml"
    assert path.read_bytes().startswith(head)


def test_without_matplotlib_there_is_no_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(["plan", str(HOME), "--draw", str(tmp_path / "x.png")]) == 2
    assert "pip install 'shoal[draw]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either a cluster file or --live"),
        ([str(HOME), "--live"], "give either a cluster file or --live"),
        (["--live"], "add --join ADDR"),
        ([str(HOME), "--commands", "--json"], "--commands and --json: give one"),
        ([str(HOME), "--objective", "fast"], "--objective fast: choose latency, response"),
        ([str(HOME), "--policy", "best"], "no rule of placement is called 'best'"),
        ([str(HOME), "--policy", "milp"], "plans for hub prices only"),
        ([str(HOME), "--draw", "plan.pdf"], "name a file that ends in .png or .svg"),
        ([str(HOME), "--draw", "/nowhere/plan.png"], "there is no folder /nowhere"),
        (["nowhere.toml"], "can't read nowhere.toml"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, said, capsys):
    assert run(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_a_model_that_fits_nowhere(tmp_path, capsys):
    text = HOME.read_text().replace("params_per_block = 218e6", "params_per_block = 218e9")
    (tmp_path / "c.toml").write_text(text)
    assert run(["plan", str(tmp_path / "c.toml"), *QUICK]) == 1
    assert "no placement exists: 32 blocks with one session need" in capsys.readouterr().err


def test_replicas_in_words():
    assert replicas_text((3, 3, 1)) == "3 of [0,2), 1 of [2,3)"
    assert replicas_text(tuple(range(1, 21))) == "1 to 20 per block, 10 on average"


# --- a live swarm -------------------------------------------------------------------------


def seen(number, start, end, *, model="abc", error="", rtt_s=0.02, **changes):
    peer = PeerId(bytes([number]) * 32)
    facts = {
        "peer": peer,
        "swarm": "s",
        "boot_ms": 1,
        "counter": 1,
        "ttl_s": 60.0,
        "state": "online",
        "addresses": [f"tcp://{peer_text(peer)}@10.0.0.{number}:4001"],
        "model": model,
        "num_blocks": 8,
        "hidden_size": 16,
        "start": start,
        "end": end,
        "encodings": ["float32"],
        "cache_tokens": 8192,
        "decode_s_per_block": 0.002,
        "prefill_s_per_block_token": 0.0001,
    }
    return Seen(record=Record(**{**facts, **changes}), rtt_s=rtt_s, error=error)


def plan_of(servers, **asked):
    cluster = observed(servers, None, Asked(**asked))
    budget = Budget(moves_max=50)
    return cluster, propose(cluster.problem, "latency", present=cluster.present, budget=budget)


def test_a_swarm_is_what_its_records_say():
    cluster, _ = plan_of([seen(1, 0, 4), seen(2, 4, 8, decode_s_per_block=0.0)], sessions=3)
    problem = cluster.problem
    assert problem.links.flow == "hub"
    assert problem.links.client_rtt_s == ((0.02, 0.02),)
    assert [server.num_blocks_max for server in problem.servers] == [4, 4]
    assert problem.servers[0].decode.at(1) == 0.002
    assert problem.servers[0].decode.at(64) == pytest.approx(0.0064)
    assert problem.servers[1].decode.at(1) == 0.01
    # As many sessions of 768 positions as its cache of 8,192 holds.
    span = Span(0, 4)
    free = problem.servers[0].memory_bytes - problem.weight_bytes(span)
    assert free // problem.session_bytes(span) == 8192 // 768
    assert problem.workload.sessions == 3
    assert any("1 servers have not measured" in note for note in cluster.notes)


def test_measured_batches_go_before_guesses():
    measured = [(1, 0.002), (8, 0.003)]
    cluster, _ = plan_of([seen(1, 0, 8, decode_s_by_batch=measured)])
    assert cluster.problem.servers[0].decode.points == tuple(measured)


def test_round_trips_between_servers_are_those_of_their_coordinates():
    near = Coordinate([0.0, 0.0, 0.0], 0.002, 0.1)
    far = Coordinate([0.03, 0.0, 0.0], 0.003, 0.1)
    cluster, _ = plan_of([seen(1, 0, 4, coordinate=near), seen(2, 4, 8, coordinate=far)])
    links = cluster.problem.links
    assert links.flow == "push"
    assert links.client_rtt_s == ((0.02, 0.02),)
    assert links.server_rtt_s[0][1] == pytest.approx(0.035)
    farther = Coordinate([0.3, 0.0, 0.0], 0.003, 0.1)
    cluster, _ = plan_of([seen(1, 0, 4, coordinate=near), seen(2, 4, 8, coordinate=farther)])
    assert cluster.problem.links.server_rtt_s[0][1] == pytest.approx(0.04), "no more than via us"
    assert any("estimated from their coordinates" in note for note in cluster.notes)
    lost = Coordinate([0.0, 0.0, 0.0], 0.002, 1.5)
    cluster, _ = plan_of([seen(1, 0, 4, coordinate=lost), seen(2, 4, 8), seen(3, 4, 8)])
    assert cluster.problem.links.flow == "hub"


def test_who_leaves_or_is_silent_does_not_count():
    silent, leaving = seen(2, 0, 8, error="no answer"), seen(3, 0, 8, state="draining")
    odd = seen(4, 0, 20, num_blocks=20)
    cluster, proposal = plan_of([seen(1, 0, 8), silent, leaving, odd])
    assert len(cluster.problem.servers) == 1
    assert any("3 servers that leave, don't answer" in note for note in cluster.notes)
    assert move_lines(cluster, proposal) == ()
    with pytest.raises(NoRouteError, match="answers and stays"):
        observed([silent, leaving], None, Asked())
    with pytest.raises(ConfigError, match="has 65535 blocks; planning takes 4096"):
        observed([seen(1, 0, 8, num_blocks=65535)], None, Asked())
    with pytest.raises(NoRouteError, match="no servers"):
        observed([], None, Asked())


def test_moves_of_a_swarm_are_commands():
    """Two servers hold the same half; one of them is to move, and joins by the other."""
    cluster, proposal = plan_of([seen(1, 0, 4), seen(2, 0, 4)])
    lines = move_lines(cluster, proposal)
    commands = [serve_arguments(line) for line in lines if not line.startswith("#")]
    assert [one["blocks"] for one in commands] == ["4:8"]
    assert lines[0].startswith("# MODEL")
    (joined,) = commands[0]["join"]
    mover = proposal.change.moves[0].server
    assert joined == cluster.servers[1 - mover].address


def test_the_last_of_all_movers_joins_by_the_first():
    servers = [seen(1, 0, 4, decode_s_per_block=0.001), seen(2, 2, 8)]
    cluster, proposal = plan_of(servers)
    moves = proposal.change.moves
    if len(moves) == 2:
        text = "\n".join(move_lines(cluster, proposal))
        assert '"$ADDRESS"' in text


def test_a_model_is_named_by_its_hash():
    servers = [seen(1, 0, 8, model="aabb"), seen(2, 0, 8, model="aacc")]
    with pytest.raises(ConfigError, match="serves 2 models"):
        observed(servers, None, Asked())
    assert len(observed(servers, "aab", Asked()).problem.servers) == 1
    with pytest.raises(ConfigError, match="serves aabb, aacc"):
        observed(servers, "aa", Asked())


def test_the_documented_output_is_the_real_one(capsys):
    assert run(["plan", str(HOME), "--time-limit", "60"]) == 0
    said = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    document = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert f"```\n{said}\n```" in document
