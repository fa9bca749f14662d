"""Traces recorded in the lab: what is in them, and that they play again."""

import asyncio
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from shoal.base.errors import ConfigError
from shoal.cli.app import make_app
from shoal.client.tending import TendConfig
from shoal.lab.campaign import quiet
from shoal.lab.chaos import draw_plan, run_plan
from shoal.lab.invariants import BrokenInvariant
from shoal.lab.network import LinkConditions
from shoal.lab.script import WrongText
from shoal.lab.trace_incident import find_incident
from shoal.lab.trace_reading import parse_trace, read_traces
from shoal.lab.trace_replay import MemoryRecorder, run_replay
from shoal.lab.trace_report import compare, describe, same_stories
from shoal.server.events import Arrived, Began, Ended, Holds, Linked, Ran, Routed
from shoal.server.server import Server
from shoal.server.session import HopSession
from shoal.server.trace_file import TRACE_BYTES_MIN, TraceWriter
from tests.simulation.scene import Scene, run_virtual, scene

ONE_DEATH = ("crash", "vanish", "restart", "freeze")
SEEDS = [seed for seed in range(10) if any(f.kind in ONE_DEATH for f in draw_plan(seed).faults)]
PAIR = "a 0:2, b 2:4, spare-b 2:4"


def record(story, servers=PAIR, **options):
    """The traces of a story."""
    recorders = []

    async def run():
        it = Scene(servers, **options)

        def recorder(began):
            recorders.append(MemoryRecorder(began))
            return recorders[-1]

        it.swarm.record = recorder
        async with it:
            await story(it)

    run_virtual(run)
    return [recorder.trace for recorder in recorders]


def events(traces, kind):
    return [event for trace in traces for _, event in trace.events if isinstance(event, kind)]


async def a_death(it):
    reader = await it.read(40)
    await reader.decode(10)
    await it["b"].crash()
    await reader.decode(10)


# --- what is recorded ------------------------------------------------------------------------


def test_what_a_death_leaves_in_the_traces():
    traces = record(a_death)
    assert [trace.began.start for trace in traces] == [0, 2, 2]
    routes = events(traces, Routed)
    assert {route.epoch for route in routes} == {1, 2}
    assert len({route.s for route in routes}) == 1
    assert sum(event.n for event in events(traces[:1], Arrived)) == 60
    assert events(traces, Ran)[-1].end == 60
    assert [event.what for event in events(traces[:1], Linked)].count("dialled") == 2
    assert len(events(traces, Ended)) == 2  # the crashed one says nothing


def test_evictions_are_recorded_wherever_they_come_from():
    async def story(it):
        reader = await it.read(40)
        it["b"].server.evict_all()
        await reader.decode(1)

    (evicted,) = [event for event in events(record(story), Holds) if event.is_evicted]
    assert (evicted.at, evicted.have) == (2, 0)


@scene(PAIR)
async def test_a_server_that_is_not_recorded_is_the_plain_one(it):
    assert type(it["a"].server) is Server


# --- again ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_chaos_seed_with_one_fault_plays_again_with_the_same_repairs(seed):
    plan = draw_plan(seed)
    fault = next(fault for fault in plan.faults if fault.kind in ONE_DEATH)
    link = LinkConditions(delay_s=plan.link.delay_s)
    plan = replace(plan, faults=(fault,), ghost=None, link=link)
    recorders = []

    def recorder(began):
        recorders.append(MemoryRecorder(began))
        return recorders[-1]

    with quiet():
        run_plan(plan, record=recorder)
        incident = find_incident([recorder.trace for recorder in recorders])
        again = run_replay(incident, 0)
    assert len(incident.sessions) >= len(plan.users)
    difference = "\n".join([*describe(incident), *compare(incident, again)])
    assert same_stories(incident, again) == len(incident.sessions), difference
    assert not again.ended


def test_a_replay_is_the_same_each_time_and_other_seeds_differ():
    incident = find_incident(record(a_death))
    with quiet():
        first, same, other = (run_replay(incident, seed) for seed in (1, 1, 2))
    assert first == same
    assert first.incident.sessions != other.incident.sessions
    assert same_stories(incident, other) == 1


def test_the_epochs_are_those_of_the_trace():
    incident = find_incident(record(a_death))
    with quiet():
        again = run_replay(incident, 0).incident
    (past,), (mine,) = incident.sessions, again.sessions
    assert [link.epoch for link in past.epochs] == [link.epoch for link in mine.epochs] == [1, 2]
    assert past.acts
    assert len(past.acts) == len(mine.acts)
    how = {server.iteration_s > 0.01: server.lives[0].how for server in incident.servers[1:]}
    assert how == {True: "stopped", False: "killed"}
    assert [server.lives[0].how for server in again.servers].count("killed") == 1


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_server_without_a_trace_is_known_from_the_others(missing):
    traces = record(a_death)
    del traces[missing]
    incident = find_incident(traces)
    assert len(incident.servers) == 3
    assert sum(server.began is None for server in incident.servers) == 1
    with quiet():
        again = run_replay(incident, 0)
    assert [len(one.chains) for one in again.incident.sessions] == [2]
    assert again.incident.sessions[0].length == incident.sessions[0].length == 60


@pytest.mark.parametrize("skew_s", [-3600.0, 0.1, 86_400.0])
def test_clocks_of_servers_may_differ(skew_s):
    traces = record(a_death)
    traces[1] = traces[1].shifted(skew_s)
    incident = find_incident(traces)
    assert incident.end_s < 60
    with quiet():
        again = run_replay(incident, 0)
    assert same_stories(incident, again) == 1


def test_standbys_are_there_again():
    async def story(it):
        client = await it.swarm.open_client(tending=TendConfig(standby=1))
        reader = await it.read(200, client=client)
        await reader.decode(10)
        await it["b"].crash()
        await reader.decode(10)

    incident = find_incident(record(story, "a 0:2, b 2:4, spare-a 0:2, spare-b 2:4"))
    (past,) = incident.sessions
    assert past.standbys == 1
    with quiet():
        again = run_replay(incident, 0)
    (mine,) = again.incident.sessions
    assert mine.standbys == 1
    assert same_stories(incident, again) == 1


def test_truncations_and_forks_are_found():
    async def story(it):
        reader = await it.read(30)
        await reader.verify(5)
        await reader.decode(3)
        child = await reader.fork(20)
        await child.decode(4)

    incident = find_incident(record(story))
    parent, child = incident.sessions
    assert (parent.length, child.length) == (34, 24)
    assert (child.parent, child.parent_length) == ("r0", 20)
    assert [act.count for act in parent.acts if act.kind == "cut"] == [31]
    with quiet():
        again = run_replay(incident, 0)
    assert same_stories(incident, again) == 2


def test_a_bug_is_found_in_a_replay(monkeypatch):
    """The lab judges the rows: a server that forgets to cut its log is caught."""
    incident = find_incident(record(a_death))
    monkeypatch.setattr(HopSession, "commit", _doubled(HopSession.commit))
    with quiet(), pytest.raises((WrongText, BrokenInvariant, TimeoutError)):
        run_replay(incident, 0)


def _doubled(commit):
    """Each output is that of the row before."""
    last = {}

    def wrong(hop, output):
        before = last.setdefault(id(hop), output)
        last[id(hop)] = output
        commit(hop, before if len(before) == len(output) else output)

    return wrong


# --- files -------------------------------------------------------------------------------------


def written(tmp_path, story=a_death, **options):
    """The files of a story."""
    numbers = iter(range(100))

    async def run():
        it = Scene(PAIR, **options)
        now = asyncio.get_running_loop().time
        it.swarm.record = lambda began: TraceWriter(
            tmp_path / f"{began.peer}-{next(numbers)}.trace", began, now
        )
        async with it:
            await story(it)

    run_virtual(run)
    return sorted(tmp_path.iterdir())


def test_the_command_shows_both_sides(tmp_path):
    files = written(tmp_path)
    result = CliRunner().invoke(make_app(), ["simulate", "replay", *map(str, files)])
    assert result.exit_code == 0, result.stderr
    assert "s1" in result.stdout
    assert "killed" in result.stdout
    assert "DIFFERS" not in result.stdout
    assert result.stdout.splitlines()[-1] == "1 replays, 1 as in the traces, 0 failures"


def test_chaos_writes_traces_too(tmp_path):
    folder = tmp_path / "traces"
    chaos = ["simulate", "chaos", "--first", "3", "--seeds", "1", "--traces", str(folder)]
    assert CliRunner().invoke(make_app(), chaos).exit_code == 0
    files = list(map(str, folder.iterdir()))
    assert files
    result = CliRunner().invoke(make_app(), ["simulate", "replay", *files])
    assert result.exit_code == 0, result.stderr
    again = CliRunner().invoke(make_app(), chaos)
    assert isinstance(again.exception, ConfigError), again.stderr
    many = CliRunner().invoke(make_app(), [*chaos, "--seeds", "2"])
    assert isinstance(many.exception, ConfigError), many.stderr


def test_the_same_file_twice_is_one(tmp_path):
    files = written(tmp_path)
    assert find_incident(read_traces(files)) == find_incident(read_traces([*files, *files]))


def began(**changed):
    fields = {"shoal_trace": 1, "boot_s": 5.0, "peer": "a" * 8, "start": 0, "end": 2}
    return Began(**{**fields, "num_blocks": 2, "cache_tokens": 64, "row_bytes": 64, **changed})


def writer(path, **options):
    clock = iter(range(1_000_000))
    return TraceWriter(path, began(), lambda: float(next(clock)), **options)


def test_a_trace_is_bounded_and_each_part_says_what_is_open(tmp_path):
    path = tmp_path / "a.trace"
    it = writer(path, limit_bytes=TRACE_BYTES_MIN)
    route = Routed("0" * 12, "b" * 8, 1, [("a" * 8, 0, 2)], 7, [(0, 0, 0)])
    it.record(route)
    for end in range(5000):
        it.record(Ran("0" * 12, 0, end, end, 64))
    sizes = [file.stat().st_size for file in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) < TRACE_BYTES_MIN + 1000
    (trace,) = read_traces(tmp_path.iterdir())
    assert trace.events[0][1] == route
    assert trace.events[-1][1].end == 4999
    assert path.stat().st_mode & 0o077 == 0


def test_a_server_that_starts_again_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "a.trace"
    first = writer(path)
    first.record(Ran("0" * 12, 0, 1, 1, 64))
    first.close()
    path.write_bytes(path.read_bytes()[:-9])
    TraceWriter(path, began(boot_s=90.0), lambda: 0.0).record(Ended())
    before, after = read_traces([path])
    assert before.events == ()
    assert [event for _, event in after.events] == [Ended()]


def test_a_file_that_is_no_trace_is_left_alone(tmp_path):
    path = tmp_path / "letter.txt"
    path.write_text("Dear Sir")
    with pytest.raises(ConfigError, match="no trace"):
        writer(path)
    assert path.read_text() == "Dear Sir"
    with pytest.raises(ConfigError, match="can't write"):
        writer(tmp_path / "nowhere" / "a.trace")


HEAD = b'[0.0,{"e":"began","shoal_trace":1,"boot_s":1.0,"peer":"aaaaaaaa","start":0,"end":2,'
HEAD += b'"num_blocks":2,"cache_tokens":64,"row_bytes":64}]\n'
OUT = b'[%s,{"e":"out","s":"000000000000","at":0,"end":1,"cache":1,"log_bytes":1}]\n'


@pytest.mark.parametrize(
    ("data", "line", "text"),
    [
        (b"", 0, "empty"),
        (OUT % b"1.0", 1, "begins with"),
        (b"GIF89a\n" + HEAD, 1, "malformed"),
        (HEAD + b"{}\n" + OUT % b"1.0", 2, "array"),
        (HEAD + b'[1.0,{"e":"bang"}]\n' + OUT % b"2.0", 2, "bang"),
        (HEAD + b'[-1.0,{"e":"ended"}]\n', 2, "0"),
        (HEAD + b"[1.0," + b"[" * 60_000 + b"\n" + OUT % b"1.0", 2, "array"),
        (HEAD + b'[1.0,{"e":"ended","code":"' + b"x" * 70_000 + b'"}]\n', 2, "longer"),
        (HEAD + OUT % b"2.0" + OUT % b"1.0", 3, "time goes back"),
        (HEAD + (OUT % b"2.0").replace(b'"end":1', b'"end":1e9'), 2, "end"),
        (HEAD + (OUT % b"2.0").replace(b"000000", b"../../"), 2, "regex"),
        (HEAD.replace(b'"shoal_trace":1', b'"shoal_trace":2'), 1, "version 2"),
        (HEAD.replace(b'"end":2', b'"end":3'), 1, r"blocks \[0,3\)"),
        (HEAD + b"\xff\xfe\n" + OUT % b"1.0", 2, "malformed"),
    ],
)
def test_a_damaged_trace_names_its_line(data, line, text):
    where = f"x line {line}" if line else "x"
    with pytest.raises(ConfigError, match=text) as caught:
        parse_trace(data, "x")
    assert caught.value.detail.startswith(where)


def test_a_trace_without_sessions_is_no_incident():
    with pytest.raises(ConfigError, match="no session"):
        find_incident(parse_trace(HEAD + OUT % b"1.0", "x"))
    with pytest.raises(ConfigError, match="at least one"):
        find_incident([])


def test_a_part_of_the_traces():
    """Sessions that were open then begin with their route; their rows come as one prompt."""
    traces = record(a_death)
    whole = find_incident(traces)
    (past,) = whole.sessions
    middle = (past.acts[8].at_s, past.acts[-3].at_s)
    part = find_incident(traces, between_s=middle)
    assert part.end_s < whole.end_s
    assert 40 < part.sessions[0].length < 60
    with quiet():
        again = run_replay(part, 0)
    assert again.incident.sessions[0].length == part.sessions[0].length
    with pytest.raises(ConfigError, match="no session"):
        find_incident(traces, between_s=(1000.0, 2000.0))


@pytest.mark.parametrize("seconds", [1e5, 1e11])
def test_years_are_too_long_for_a_replay(seconds):
    traces = record(a_death)
    late = replace(traces[0], events=(*traces[0].events, (seconds, Ended())))
    with pytest.raises(ConfigError, match=r"seconds are too many .* --from and --to"):
        find_incident([late, *traces[1:]])


def test_too_much_for_a_replay_is_refused():
    route = b'[1.0,{"e":"routed","s":"000000000000","owner":"bbbbbbbb","epoch":1,'
    route += b'"hops":[["aaaaaaaa",0,2]],"opened_ms":1,"held":[]}]\n'
    rows = b'[%d.0,{"e":"in","s":"000000000000","at":0,"epoch":1,"rev":0,"pos":%d,"n":4096,'
    rows += b'"bytes":1}]\n'
    lines = b"".join(rows % (2 + index, 4096 * index) for index in range(250))
    data = (HEAD + route + lines).replace(b'"num_blocks":2', b'"num_blocks":200')
    with pytest.raises(ConfigError, match="too many for one replay"):
        find_incident(parse_trace(data, "x"))
