"""Traces as files: bounded, damaged, written by the command."""

import asyncio
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.base.errors import ConfigError
from shoal.cli.app import make_app
from shoal.lab.trace_incident import find_incident
from shoal.lab.trace_reading import parse_trace, read_traces
from shoal.server.events import Began, Ended, Ran, Routed
from shoal.server.trace_file import TRACE_BYTES_MIN, TraceWriter
from tests.simulation.scene import Scene, run_virtual
from tests.simulation.test_trace import PAIR, a_death


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


def test_a_full_disk_ends_the_trace_and_not_the_server(tmp_path, caplog):
    it = writer(tmp_path / "a.trace")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, it._handle)
    os.close(full)
    with caplog.at_level("WARNING", logger="shoal"):
        it.record(Ended())
        it.record(Ended())
    assert caplog.text.count("trace ended") == 1
    with pytest.raises(ConfigError, match="No space left"):
        writer(Path("/dev/full"))


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


def test_too_much_for_a_replay_is_refused():
    route = b'[1.0,{"e":"routed","s":"000000000000","owner":"bbbbbbbb","epoch":1,'
    route += b'"hops":[["aaaaaaaa",0,2]],"opened_ms":1,"held":[]}]\n'
    rows = b'[%d.0,{"e":"in","s":"000000000000","at":0,"epoch":1,"rev":0,"pos":%d,"n":4096,'
    rows += b'"bytes":1}]\n'
    lines = b"".join(rows % (2 + index, 4096 * index) for index in range(250))
    data = (HEAD + route + lines).replace(b'"num_blocks":2', b'"num_blocks":200')
    with pytest.raises(ConfigError, match="too many for one replay"):
        find_incident(parse_trace(data, "x"))
