"""Traces recorded in the lab: what is in them, and that they play again."""

from dataclasses import replace

import pytest

from shoal.base.errors import ConfigError
from shoal.client.tending import TendConfig
from shoal.lab.campaign import quiet
from shoal.lab.chaos import draw_plan, run_plan
from shoal.lab.invariants import BrokenInvariant
from shoal.lab.network import LinkConditions
from shoal.lab.script import WrongText
from shoal.lab.trace_incident import find_incident
from shoal.lab.trace_replay import MemoryRecorder, run_replay
from shoal.lab.trace_report import compare, describe, same_stories
from shoal.server.events import Arrived, Ended, Holds, Linked, Ran, Routed
from shoal.server.server import Server
from shoal.server.session import HopSession
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


# --- too much --------------------------------------------------------------------------------


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
