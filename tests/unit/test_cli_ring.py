"""The ring's file, its options, and how much memory a machine offers."""

import asyncio
import io
import json
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from rich.console import Console

from shoal.base.errors import ConfigError, PeerBusy, PeerRefused, PeerUnreachable
from shoal.base.spans import Span
from shoal.cli import ring_join
from shoal.cli.app import run
from shoal.cli.joining import SwarmChoice
from shoal.cli.models import OpenModel
from shoal.cli.ring_config import RingConfig, parse_split, read_config
from shoal.cli.ring_file import RingFile, find_ring, written
from shoal.cli.ring_footing import stand
from shoal.cli.ring_host import RESERVE_BYTES, HostSettings, check_room
from shoal.cli.ring_join import JoinSettings, join_until_over
from shoal.cli.ring_memory import memory_left, process_memory
from shoal.cli.ring_show import as_dict, table_of
from shoal.cli.ring_sizes import ring_sizes
from shoal.cli.ring_up import starter_keys
from shoal.model.manifest import build_manifest
from shoal.model.measure import measure_block_times
from shoal.model.probe_source import ProbeSource
from shoal.model.span_model import block_bytes
from shoal.model.torch_backend import BackendConfig, load_backend
from shoal.net.address import Address, ListenAddress
from shoal.net.channel import accept_channel
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.memory import MemoryNetwork
from shoal.net.tcp import TcpTransport
from shoal.wire.ring import JoinRing, RingModel, RingNode, RingState
from tests.models import NUM_BLOCKS, tiny_source

TOML = """
model = "smollm2-135m-instruct"
nodes = 3
split = [4, 4, 4]
starter_blocks = "auto"
lan = true
cache_tokens = 2048
quantize = "int8"
memory = "700MB"
"""

NODES = {
    "nodes": {
        "starter": {
            "addr": "10.0.0.5",
            "communication": {"port": 8088},
            "inference": {"port_in": 5088, "port_out": 5089},
            "device": "cpu",
        },
        "secondary": [
            {"addr": f"10.0.0.{host}", "communication": {"starter_addr": "10.0.0.5", "port": 8089}}
            for host in (6, 7)
        ],
    }
}


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_file_says_what_options_do(tmp_path):
    found = read_config(write(tmp_path, "ring.toml", TOML))
    assert found == RingConfig(
        model="smollm2-135m-instruct", nodes=3, split=(4, 4, 4), starter_blocks="auto", lan=True,
        cache_tokens=2048, quantize="int8", memory="700MB",
    )  # fmt: skip
    both = RingConfig(nodes=2, dtype="bfloat16").over(found)
    assert (both.nodes, both.dtype, both.model) == (2, "bfloat16", "smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nods = 3", r"ring.toml, line 1: nods: unknown key; did you mean nodes\?"),
        ("nodes = 0", "not between 1"),
        ("nodes = true", "no whole number"),
        ("split = [1, -2]", "blocks by node"),
        ('split = "1,2"', "blocks by node"),
        ("starter_blocks = -1", "no number of blocks"),
        ("lan = 1", "true or false"),
        ("nodes = [", "no TOML"),
    ],
)
def test_nonsense_in_a_file_is_told_with_its_place(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, "ring.toml", text))


def test_a_nodes_file_of_mdi_llm_is_read(tmp_path):
    found = read_config(write(tmp_path, "configuration.json", json.dumps(NODES)))
    assert found == RingConfig(nodes=2, starter_blocks="auto", listen="tcp://10.0.0.5:8088")


@pytest.mark.parametrize(
    "text",
    ["[", "[]", '{"nodes": {}}',
     '{"nodes": {"starter": {"addr": 1, "communication": {"port": 1}}}}',
     '{"nodes": {"starter": {"addr": "a", "communication": {"port": 1}}, "secondary": {}}}'],
)  # fmt: skip
def test_other_json_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"no nodes file|can't read"):
        read_config(write(tmp_path, "nodes.json", text))


def test_a_split_on_the_command_line():
    assert parse_split("10, 12") == (10, 12)
    with pytest.raises(ConfigError, match="10,12"):
        parse_split("10;12")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up"], "no model named"),
        (["up", "--model", "x"], "how many machines"),
        (["up", "--model", "x", "--nodes", "0"], "a ring of 0 nodes"),
        (["up", "--model", "x", "--nodes", "1", "--starter-blocks", "some"], "a number of blocks"),
        (["up", "--model", "x", "--nodes", "1", "--dtype", "int"], "dtype"),
        (["up", "--model", "x", "--nodes", "1", "--quantize", "int3"], "int3"),
        (["join"], "no starter named"),
        (["join", "--lan"], "rings are private"),
        (["join", "--lan", "--swarm", "lab", "--memory", "much"], "--memory"),
        (["status"], "no ring is up on this machine"),
    ],
)
def test_wrong_command_lines(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    assert run(["ring", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_ring_is_found_while_it_is_up(tmp_path):
    path = tmp_path / "folder" / "ring.json"
    ring = RingFile(
        address="tcp://gbrv7flgdm4dh6zn7s33bqixl7s753k5iwui6np7e5ryrfl4shmq@127.0.0.1:1",
        invite=None, swarm="lab", given="x", model="y",
    )  # fmt: skip
    with written(ring, path):
        assert find_ring(path) == ring
        assert path.stat().st_mode & 0o077 == 0
        assert ring.choice().name == "lab"
    with pytest.raises(ConfigError, match="shoal ring up"):
        find_ring(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no file of shoal ring up"):
        find_ring(path)


def test_a_file_of_another_ring_is_left_alone(tmp_path):
    path = tmp_path / "ring.json"
    ring = RingFile(address="a", invite=None, swarm="lab", given="x", model="y")
    with written(ring, path):
        path.write_text("another")
    assert path.read_text() == "another"


def test_a_starter_keeps_its_keys(tmp_path):
    first, second = starter_keys(tmp_path), starter_keys(tmp_path)
    assert first.invite == second.invite
    assert first.identity.peer == second.identity.peer
    assert (tmp_path / "invite").stat().st_mode & 0o077 == 0


def test_memory_that_is_left_is_what_the_limit_leaves():
    now = process_memory()
    assert 0 < now.resident <= now.peak
    assert memory_left(now.resident + (64 << 20)) <= 64 << 20
    assert memory_left(1) == 0


def test_a_span_without_room_is_refused_with_the_numbers():
    sizes = ring_sizes(tiny_source().config, "float32", "none", 100)
    need = sizes.need_bytes(Span(0, 2))
    check_room(sizes, Span(0, 2), need, "blocks [0,2)")
    with pytest.raises(ConfigError, match=r"blocks \[0,2\) with a cache of 100 positions need"):
        check_room(sizes, Span(0, 2), need - 1, "blocks [0,2)")
    check_room(sizes, Span(0, 3), need, "blocks [0,3)", Span(0, 2))  # two are here already
    assert RESERVE_BYTES


def test_sizes_are_those_of_blocks_caches_and_ends():
    config = tiny_source().config
    sizes = ring_sizes(config, "bfloat16", "none", 16)
    assert sizes.num_blocks == NUM_BLOCKS
    assert list(sizes.weight_bytes) == block_bytes(config, "bfloat16")
    assert sizes.row_bytes == 2 * 48
    assert sizes.head_bytes == 2 * 96 * 48
    assert sizes.spare_bytes == 4 * 80 * 48  # the largest matrix, in float32
    assert sizes.keeps_blocks
    assert not ring_sizes(tiny_source("mixtral").config, "float32", "none", 16).keeps_blocks
    assert ring_sizes(config, "bfloat16", "int8", 16).weight_bytes[0] < sizes.weight_bytes[0]


def test_a_block_is_measured_without_its_weights():
    backend = load_backend(
        ProbeSource(tiny_source()), Span(0, 1), BackendConfig(model="0" * 32, cache_tokens=256)
    )

    async def measured():
        try:
            return await measure_block_times(backend)
        finally:
            await backend.aclose()

    assert asyncio.run(measured()).decode_s_per_block > 0


def test_a_view_of_the_nodes():
    node = RingNode(
        peer=bytes(32), name="board", state="failed", start=0, end=2, is_starter=False,
        memory_bytes=5 << 20, memory_peak_bytes=6 << 20, planned_bytes=0, offered_bytes=7 << 20,
        busy_s=1.0, up_s=4.0, iterations=1, rows=1, pace_s=0.0, age_s=0.1,
        decode_s_by_batch=[(1, 0.002)], detail="[disk] full",
    )  # fmt: skip
    state = RingState(1, 2, False, [node], "a proposal")
    assert as_dict(state)["nodes"][0]["blocks"] == [0, 2]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table_of(state.nodes))
    text = console.export_text()
    for part in ("board", "[0,2)", "failed: [disk] full", "peak 6", "7 MiB", "2.00 ms", "25%"):
        assert part in text


def test_who_finds_nobody_to_join_listens_no_more():
    source = tiny_source()
    manifest = build_manifest(source)
    model = OpenModel(
        given="tiny", source=source, name=bytes(16).hex(), num_blocks=NUM_BLOCKS, hidden_size=8,
        manifest=manifest,
    )  # fmt: skip
    me = Identity.generate()

    async def story():
        transport = MemoryNetwork().transport(me.peer)
        nobody = Address("memory", Identity.generate().peer, "nobody", 1)
        for _ in range(2):
            async with AsyncExitStack() as stack:
                with pytest.raises(PeerUnreachable):
                    await stand(
                        stack, me, SwarmPass.open("tests"), transport, model=model,
                        ring=RingModel(bytes(16), "float32", "none", "auto", 16),
                        listen=ListenAddress("memory", "node", 1), joins=(nobody,),
                        weights_bytes_per_s=1 << 20,
                    )  # fmt: skip
        await transport.close()

    asyncio.run(story())


def test_a_machine_that_is_not_taken_asks_again(monkeypatch, capsys):
    monkeypatch.setattr(ring_join, "LOOK_S", 0.01)
    answers = [PeerBusy("no more nodes"), PeerBusy("no more nodes"), PeerRefused("go away")]
    swarm_pass = SwarmPass.open("tests")

    async def serve(stream):
        channel, _ = await accept_channel(stream, swarm_pass)
        try:
            assert isinstance((await channel.receive())[0], JoinRing)
            await channel.refuse(answers.pop(0))
        except PeerUnreachable:
            pass  # who only sees whether we are here

    async def story():
        transport = TcpTransport(Identity.generate())
        listener = await transport.listen(ListenAddress("tcp", "127.0.0.1", 0), serve)
        settings = JoinSettings(
            swarm=SwarmChoice(joins=(listener.address,), name="tests", invite=None),
            name="n", listen=None, announce=None,
            host=HostSettings(threads=1, memory_bytes=None), cache_limit_bytes=1,
            patience_s=5.0, is_once=False, drain_s=30.0,
        )  # fmt: skip
        stop = asyncio.Event()
        try:
            with pytest.raises(PeerRefused, match="go away"):
                await join_until_over(settings, stop)
            answers.append(PeerBusy("no more nodes"))
            with pytest.raises(PeerBusy):
                await join_until_over(replace(settings, is_once=True), stop)
            stop.set()
            await join_until_over(settings, stop)  # nothing runs here: it leaves at once
        finally:
            await transport.close()

    asyncio.run(story())
    out, err = capsys.readouterr()
    assert err.count("no more nodes") == 1
    assert "joined" not in out
