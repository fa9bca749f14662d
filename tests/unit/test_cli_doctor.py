"""`shoal doctor`: what is fine, what is not, and that every problem has a fix."""

import json
import os
import socket

import pytest

from shoal.base.ids import peer_text
from shoal.cli import examining
from shoal.cli.app import run
from shoal.cli.findings import (
    judge_clock,
    judge_device,
    judge_disk,
    judge_join,
    judge_memory,
    judge_open_files,
    judge_packages,
    judge_peer_clocks,
    judge_port,
    judge_swarm,
    judge_threads,
)
from shoal.cli.machine import Machine, _cpu_quota, _memory, disk_free_bytes
from shoal.net.identity import Identity
from tests.models import save_safetensors

GB = 10**9
NOW_S = 1_795_000_000.0
DEAD = f"tcp://{peer_text(Identity.from_seed(bytes(32)).peer)}@127.0.0.1:1"


def machine(**changes):
    facts = {
        "cores": 4,
        "cpu_quota": None,
        "memory_bytes": 16 * GB,
        "memory_free_bytes": 8 * GB,
        "open_files_max": 4096,
    }
    return Machine(**{**facts, **changes})


def device(gpu=None, cuda=False, driver=False):
    return judge_device(gpu, has_cuda_build=cuda, has_nvidia_driver=driver)


@pytest.mark.parametrize(
    ("finding", "level", "said"),
    [
        (judge_packages({}, {"shoal": "1"}), "ok", "shoal 1"),
        (judge_packages({"torch": "not installed"}, {}), "fail", "torch: not installed"),
        (device(), "ok", "cpu"),
        (device("H200, 150 GB", cuda=True, driver=True), "ok", "cuda: H200"),
        (device(driver=True), "warn", "CPU build"),
        (device(cuda=True, driver=True), "warn", "sees no GPU"),
        (judge_threads(machine(), None), "ok", "4 (physical"),
        (judge_threads(machine(), "4"), "ok", "4 (physical"),
        (judge_threads(machine(), "1"), "ok", "OMP_NUM_THREADS=1 has no effect"),
        (judge_threads(machine(cpu_quota=1.5), None), "warn", "1.5 CPUs"),
        (judge_memory(machine()), "ok", "8.0 GB free of 16.0 GB"),
        (judge_memory(machine(memory_free_bytes=GB)), "warn", "1.0 GB free"),
        (judge_memory(machine(memory_free_bytes=None)), "ok", "16.0 GB in all"),
        (judge_memory(machine(memory_free_bytes=None, memory_bytes=None)), "ok", "unknown"),
        (judge_disk("/c", 50 * GB, is_writable=True), "ok", "50.0 GB free in /c"),
        (judge_disk("/c", GB, is_writable=True), "warn", "1.0 GB"),
        (judge_disk("/c", 1, is_writable=True), "fail", "0.0 GB"),
        (judge_disk("/c", 50 * GB, is_writable=False), "fail", "can't be written"),
        (judge_open_files(machine()), "ok", "4096"),
        (judge_open_files(machine(open_files_max=None)), "ok", "no limit"),
        (judge_open_files(machine(open_files_max=512)), "warn", "512"),
        (judge_open_files(machine(open_files_max=64)), "fail", "64"),
        (judge_clock(NOW_S, NOW_S - 9e6), "ok", "2026-11-18"),
        (judge_clock(NOW_S, NOW_S + 9e6), "fail", "before Shoal was installed"),
        (judge_clock(NOW_S + 3e9, NOW_S), "fail", "far in the future"),
        (judge_peer_clocks({}), "ok", "no server"),
        (judge_peer_clocks({"abc": -5.0, "def": 30.0}), "ok", "no server"),
        (judge_peer_clocks({"abc": 3600.0}), "warn", "abc (3600 s)"),
        (judge_port("tcp://h:1", None, "no such host", None), "fail", "tcp://h:1: no such host"),
        (judge_port("tcp://h:1", None, "tcp://h:1 is taken", None), "fail", "tcp://h:1 is taken"),
        (judge_port("a", "tcp://127.0.0.1:7", "", "10.0.0.2"), "ok", "this machine only"),
        (judge_port("a", "tcp://[::1]:7", "", "10.0.0.2"), "ok", "this machine only"),
        (judge_port("a", "tcp://0.0.0.0:7", "", "10.0.0.2"), "ok", "10.0.0.2:7"),
        (judge_port("a", "tcp://my.host:7", "", None), "ok", "if no firewall"),
        (judge_join("A", 0.02, ""), "ok", "20.0 ms"),
        (judge_join("A", 0.9, ""), "warn", "900.0 ms"),
        (judge_join("A", None, "refused"), "fail", "A: refused"),
        (judge_swarm(3, {}, {}), "ok", "3; all answer"),
        (judge_swarm(3, {"abc": "silent"}, {}), "warn", "abc does not answer (silent)"),
        (judge_swarm(3, {}, {"m": "[2,3)"}), "warn", "nobody serves blocks [2,3) of m"),
    ],
)
def test_judgements(finding, level, said):
    assert finding.level == level
    assert said in finding.text
    assert bool(finding.fix) == (level != "ok")


@pytest.mark.parametrize(
    ("version", "wanted", "is_fine"),
    [
        ("2.13.0+cpu", ">=2.8,<3", True),
        ("2.7.1", ">=2.8,<3", False),
        ("3.0", ">=2.8,<3", False),
        ("5.19.0", ">=5.19", True),
        ("0.20.3rc1", ">=0.21", False),
        ("1.0", "", True),
    ],
)
def test_ranges_of_versions(version, wanted, is_fine):
    assert examining._is_within(version, wanted) is is_fine


def test_every_range_of_ours_is_understood():
    wanted = dict(examining._requirements())
    assert {"torch", "transformers", "typer", "msgspec"} <= set(wanted)
    assert "pytest" not in wanted
    signs = {
        part.rstrip("0123456789.") for text in wanted.values() for part in text.split(",") if part
    }
    assert signs <= {">=", "<"}


def test_a_missing_package_is_found(monkeypatch):
    monkeypatch.setattr(
        examining, "_requirements", lambda: iter([("nosuch-package", ">=1"), ("typer", "<0.1")])
    )
    problems = examining._package_problems()
    assert problems["nosuch-package"] == "not installed"
    assert problems["typer"].endswith("is not <0.1")


def test_the_system_is_read_as_it_writes(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:  500 kB\n")
    assert _memory(meminfo) == (1000 * 1024, 500 * 1024)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert _cpu_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert _cpu_quota(tmp_path) is None
    assert _cpu_quota(tmp_path / "nosuch") is None
    free_bytes, is_writable = disk_free_bytes(tmp_path / "not" / "there" / "yet")
    assert free_bytes > 0
    assert is_writable


@pytest.fixture
def environment(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", dict(os.environ, SHOAL_CACHE=str(tmp_path / "cache")))


def findings(capsys, *arguments):
    """(exit code, findings by name) of `shoal doctor --json`."""
    code = run(["doctor", *arguments, "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["ok"] == (code == 0)
    return code, {one["name"]: one for one in said["findings"]}


def test_this_machine_and_a_model(capsys, environment, tmp_path):
    save_safetensors(tmp_path)
    code, found = findings(capsys, str(tmp_path))
    assert code == 0, found
    assert list(found)[:3] == ["packages", "device", "threads"]
    assert found["model"]["level"] == "ok"
    assert found["blocks"]["text"].startswith("7 of 7")
    assert found["tokenizer"]["level"] == "warn"


def test_all_failures_are_told_at_once(capsys, environment):
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        code, found = findings(capsys, "nosuch", "--join", DEAD, "--listen", listen)
    assert code == 1
    failed = {name for name, one in found.items() if one["level"] == "fail"}
    assert failed == {"port", "model", "join"}
    assert "shoal model list" in found["model"]["fix"]


def test_for_people_there_are_lines(capsys, environment):
    assert run(["doctor", "--join", DEAD]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("1 failures")
    assert any(line.startswith("fail  join") for line in lines)
    assert any("fix: is that server up" in line for line in lines)


def test_your_mistakes_are_one_line(capsys):
    assert run(["doctor", "--listen", "nonsense"]) == 1
    assert run(["doctor", "--join", "nonsense"]) == 2
