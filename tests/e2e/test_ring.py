"""A ring of real processes: nodes that come with nothing, one that dies, limits on memory."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import signal
from contextlib import ExitStack

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.cli.ring_file import find_ring
from shoal.cli.ring_show import as_dict, look_at
from tests.e2e import processes
from tests.e2e.conftest import save_model
from tests.e2e.memory_groups import MemoryGroups, missing_groups
from tests.e2e.processes import Process, alone, end_all, error_line, run, wait_until
from tests.models import VOCABULARY

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = "What the sea gives, the sea takes."
JOIN = re.compile(r"join with: shoal (?P<arguments>ring join .*)\n")


class Ring:
    """A starter and its nodes, each with a cache folder of its own."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self._monkeypatch = monkeypatch
        self.started = []

    def use(self, name):
        """Processes started from now on have this cache."""
        self._monkeypatch.setitem(processes.ENVIRONMENT, "SHOAL_CACHE", str(self.folder / name))

    def up(self, model, nodes, *extra):
        self.use("starter")
        self.starter = self._start(
            "ring", "up", "--model", str(model), "--nodes", str(nodes), "--listen",
            "tcp://127.0.0.1:0", "--cache-tokens", "1024", *extra,
        )  # fmt: skip
        line = self.starter.wait_line(self.starter.out, "join with")
        self.joining = JOIN.fullmatch(line)["arguments"].split()
        return self

    def node(self, name, *extra, launch=None):
        self.use(name)
        node = self._start(*self.joining, "--name", name, *extra, launch=launch)
        self.use("starter")
        return node

    def ready(self):
        self.starter.wait_line(self.starter.out, "ready ring=")
        return self

    def status(self):
        return as_dict(asyncio.run(look_at(find_ring(self.folder / "starter" / "ring.json"))))

    def _start(self, *arguments, launch=None):
        self.started.append(Process(*arguments, launch=launch))
        return self.started[-1]


@pytest.fixture
def ring(tmp_path, monkeypatch):
    made = Ring(tmp_path, monkeypatch)
    yield made
    end_all(made.started)


def blocks_of(state):
    return {node["name"]: tuple(node["blocks"]) for node in state["nodes"]}


def test_nodes_without_a_model_make_a_ring(model, ring):
    ring.up(model, 2, "--starter-blocks", "1", "--split", "2,4")
    nodes = [ring.node(name, "--once") for name in ("one", "two")]
    ring.ready()
    done = run("ring", "status", "--json")
    assert done.returncode == 0, done.stderr
    state = json.loads(done.stdout)
    found = blocks_of(state)
    assert state["is_up"]
    assert found.pop("starter") == (0, 1)
    assert sorted(found.values()) == [(1, 3), (3, 7)]
    for node in state["nodes"]:
        assert node["memory_peak_bytes"] >= node["memory_bytes"] > 0
        assert node["state"] == "online"
    for node in nodes:  # exactly its own tensors: those of 2 or 4 of 7 blocks
        start, end = found[node.arguments[node.arguments.index("--name") + 1]]
        line = node.wait_line(node.err, "fetched")
        assert f"fetched {9 * (end - start)} tensors" in line
    done = run("ring", "run", "--prompt", PROMPT, "--samples", "2", "--max-new-tokens", "12",
               "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, text = alone(model, PROMPT, 12)
    assert [one["text"] for one in json.loads(done.stdout)["samples"]] == [text] * 2
    ring.starter.stop()
    assert ring.starter.wait() == 0
    for node in nodes:
        assert node.wait() == 0
        assert any("the ring is over" in line for line in node.err)
    assert not (ring.folder / "starter" / "ring.json").exists()


def test_a_node_that_dies_is_replaced_and_the_others_take_over(model, ring):
    ring.up(model, 2, "--split", "3,4")
    nodes = {name: ring.node(name) for name in ("one", "two")}
    ring.ready()
    nodes["third"] = ring.node("third")
    ring.starter.wait_line(ring.starter.err, "third is a spare")
    running = Process(
        "ring", "run", "--prompt", PROMPT, "--samples", "2", "--max-new-tokens", "400", "--json"
    )
    ring.started.append(running)
    _wait_for_rows(ring, "two")
    nodes["two"].signal(signal.SIGKILL)
    ring.starter.wait_line(ring.starter.err, "taken over: third")
    wait_until(lambda: ring.status()["is_up"], "the ring is whole again")
    _wait_for_rows(ring, "third")
    nodes["one"].signal(signal.SIGKILL)
    ring.starter.wait_line(ring.starter.err, "taken over: third [0,7)")
    assert running.wait(100) == 0, running.report()
    answer = json.loads(running.out[-1])
    _, text = alone(model, PROMPT, 400)
    assert [one["text"] for one in answer["samples"]] == [text] * 2
    assert all(len(one["recoveries"]) >= 2 for one in answer["samples"])


def test_a_node_that_is_told_to_stop_is_replaced_before_it_goes(model, ring):
    """Nothing is lost: samples move to the spare, which has replayed them by then.

    So many that they take longer than it takes the run to hear of the spare.
    """
    ring.up(model, 2, "--split", "3,4", "--cache-tokens", "65536")
    nodes = {name: ring.node(name) for name in ("one", "two")}
    ring.ready()
    ring.node("third")
    ring.starter.wait_line(ring.starter.err, "third is a spare")
    running = Process(
        "ring", "run", "--prompt", PROMPT, "--samples", "96", "--max-new-tokens", "200", "--json"
    )
    ring.started.append(running)
    _wait_for_rows(ring, "two")
    nodes["two"].stop()
    ring.starter.wait_line(ring.starter.err, "two leaves: others have its blocks")
    assert nodes["two"].wait() == 0
    assert any("leaving: others take its blocks" in line for line in nodes["two"].err)
    assert running.wait(100) == 0, running.report()
    answer = json.loads(running.out[-1])
    _, text = alone(model, PROMPT, 200)
    assert [one["text"] for one in answer["samples"]] == [text] * 96
    assert not any(one["recoveries"] for one in answer["samples"])
    assert any(one["moves"] for one in answer["samples"])
    assert not any("served by nobody" in line for line in ring.starter.err)


def _wait_for_rows(ring, name):
    """Until that node has worked on the run."""
    wait_until(
        lambda: any(one["name"] == name and one["rows"] > 50 for one in ring.status()["nodes"]),
        f"{name} works",
    )


def limited(data_bytes):
    """Starts processes whose private memory may not grow beyond this."""

    def launch(arguments):
        def limit():
            resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))

        return processes.popen(arguments, enter=limit)

    return launch


MIB = 1 << 20
LIMIT_MIB = 900
"""Of a node's private memory. Its libraries take 440 of it, and 64 are kept free."""

BLOCKS = 20
"""Of 46 MiB each in float32: 920 in all, more than the limit."""

CONSTANT_MIB = 443 + 64
"""What a node takes at its peak besides blocks, cache and log (docs/ring.md)."""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=BLOCKS, vocab_size=VOCABULARY,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    return save_model(tmp_path_factory.mktemp("large-model"), model=model)


@pytest.fixture(scope="module")
def large_text(large_model):
    """What transformers says."""
    return alone(large_model, PROMPT, 4)[1]


@pytest.fixture(scope="module")
def refused(large_model, tmp_path_factory):
    """The errors of rings of one node under each limit; both are tried at once."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        launches = {"rlimit": limited(LIMIT_MIB * MIB)}
        if not missing_groups():
            groups = stack.enter_context(MemoryGroups(LIMIT_MIB * MIB))
            launches["groups"] = groups.launch
        rings = {}
        for name, launch in launches.items():
            rings[name] = Ring(tmp_path_factory.mktemp(name), patch)
            stack.callback(end_all, rings[name].started)
            rings[name].up(large_model, 1).node("alone", "--once", launch=launch)
        errors = {}
        for name, ring in rings.items():
            assert ring.starter.wait(100) == 2, ring.starter.report()
            errors[name] = error_line("".join(ring.starter.err))
        return errors


def test_three_nodes_hold_what_one_can_not_under_the_same_limit(
    large_model, large_text, refused, ring
):
    check_refused(refused["rlimit"], LIMIT_MIB - 440)
    hold_together(large_model, large_text, ring, limited(LIMIT_MIB * MIB))


@pytest.mark.skipif(bool(missing_groups()), reason=missing_groups())
def test_three_nodes_in_containers_hold_what_one_can_not(large_model, large_text, refused, ring):
    """The system ends whoever goes over the limit: nobody does."""
    check_refused(refused["groups"], LIMIT_MIB - 96)
    with MemoryGroups(LIMIT_MIB * MIB) as groups:
        try:
            hold_together(large_model, large_text, ring, groups.launch)
            assert groups.kills() == 0
        finally:
            end_all(ring.started)


def check_refused(error, offered_mib):
    """One node alone can't have the model; the numbers are named."""
    found = re.search(r"20 blocks need (\d+) MiB .* alone (\d+) MiB", error)
    assert found, error
    assert int(found[1]) > 920
    assert int(found[2]) < offered_mib


def hold_together(large_model, large_text, ring, launch):
    """Three such nodes run the model."""
    ring.up(large_model, 3)
    for name in ("one", "two", "three"):
        ring.node(name, launch=launch)
    ring.starter.wait_line(ring.starter.out, "ready ring=", 200.0)
    done = run("ring", "run", "--prompt", PROMPT, "--samples", "2", "--max-new-tokens", "4",
               "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [one["text"] for one in json.loads(done.stdout)["samples"]] == [large_text] * 2
    for node in ring.status()["nodes"]:
        assert node["memory_peak_bytes"] <= node["planned_bytes"] + CONSTANT_MIB * MIB, node
