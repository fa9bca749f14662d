"""What `shoal doctor` makes of what it saw: pure functions from facts to findings."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal

from shoal.cli.machine import Machine

Level = Literal["ok", "warn", "fail"]

OPEN_FILES_MIN: Final = 256
"""A server has a stream or more per client and neighbour."""
OPEN_FILES_GOOD: Final = 1024

DISK_MIN_BYTES: Final = 100 << 20
"""Less than the smallest known model."""
DISK_GOOD_BYTES: Final = 5 << 30

MEMORY_GOOD_BYTES: Final = 2 << 30
"""The libraries alone take half a gigabyte."""

CLOCK_SLACK_S: Final = 60.0
"""Clocks that differ by less do no harm."""
CLOCK_YEAR_MAX: Final = 2100

SLOW_RTT_S: Final = 0.5
"""A token costs one round trip or more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    text: str
    fix: str = ""
    """What to do about it; empty if it is fine."""


def judge_packages(problems: Mapping[str, str], versions: Mapping[str, str]) -> Finding:
    """`problems`: what is wrong with a package, by its name; `versions` of those that count."""
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    if not problems:
        return Finding(name="packages", level="ok", text=told)
    wrong = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
    return Finding(
        name="packages",
        level="fail",
        text=wrong,
        fix="pip install --upgrade 'shoal[torch,cli]'",
    )


def judge_device(gpu: str | None, *, has_cuda_build: bool, has_nvidia_driver: bool) -> Finding:
    """`gpu`: the first CUDA device as torch names it, with its memory."""
    if gpu is not None:
        return Finding(name="device", level="ok", text=f"cuda: {gpu} (use it: --device cuda)")
    if has_nvidia_driver and not has_cuda_build:
        return Finding(
            name="device",
            level="warn",
            text="cpu: this machine has an NVIDIA driver, but torch is a CPU build",
            fix="install torch for CUDA: https://pytorch.org/get-started/locally/",
        )
    if has_nvidia_driver:
        return Finding(
            name="device",
            level="warn",
            text="cpu: this machine has an NVIDIA driver, but torch sees no GPU",
            fix="see what nvidia-smi says; the driver may be older than torch's CUDA",
        )
    return Finding(name="device", level="ok", text="cpu")


def judge_threads(machine: Machine, omp: str | None) -> Finding:
    """`omp`: what OMP_NUM_THREADS is."""
    text = f"{machine.cores} (physical cores; --threads changes it)"
    if omp and omp != str(machine.cores):
        text += f"; OMP_NUM_THREADS={omp} has no effect"
    quota = machine.cpu_quota
    if quota is not None and quota < machine.cores:
        wanted = max(1, int(quota))
        return Finding(
            name="threads",
            level="warn",
            text=f"{text}, but this container may use {quota:g} CPUs",
            fix=f"--threads {wanted}, or threads = {wanted} in shoal.toml",
        )
    return Finding(name="threads", level="ok", text=text)


def judge_memory(machine: Machine) -> Finding:
    """What is free for blocks and cache."""
    free, total = machine.memory_free_bytes, machine.memory_bytes
    known = free if free is not None else total
    if known is None:
        return Finding(name="memory", level="ok", text="unknown on this system")
    text = f"{_size(known)} free" if free is not None else f"{_size(known)} in all"
    if free is not None and total is not None:
        text += f" of {_size(total)}"
    if known < MEMORY_GOOD_BYTES:
        return Finding(
            name="memory",
            level="warn",
            text=text,
            fix="serve few blocks (--num-blocks), smaller weights (--quantize int8), "
            "or end other programs",
        )
    return Finding(name="memory", level="ok", text=text)


def judge_disk(folder: str, free_bytes: int, *, is_writable: bool) -> Finding:
    """The folder where models are kept."""
    text = f"{_size(free_bytes)} free in {folder}"
    elsewhere = "set SHOAL_CACHE to a folder on another disk, or free some space"
    if not is_writable:
        return Finding(
            name="disk",
            level="fail",
            text=f"{folder} can't be written",
            fix="set SHOAL_CACHE to a folder of yours",
        )
    if free_bytes < DISK_MIN_BYTES:
        return Finding(name="disk", level="fail", text=text, fix=elsewhere)
    if free_bytes < DISK_GOOD_BYTES:
        return Finding(name="disk", level="warn", text=text, fix=elsewhere)
    return Finding(name="disk", level="ok", text=text)


def judge_open_files(machine: Machine) -> Finding:
    """How many streams a process may have."""
    limit = machine.open_files_max
    if limit is None:
        return Finding(name="open files", level="ok", text="no limit")
    level: Level = "ok"
    if limit < OPEN_FILES_GOOD:
        level = "warn" if limit >= OPEN_FILES_MIN else "fail"
    fix = "" if level == "ok" else "ulimit -n 4096 before the command"
    return Finding(name="open files", level=level, text=f"at most {limit}", fix=fix)


def judge_clock(now_s: float, installed_s: float) -> Finding:
    """`installed_s`: when our newest file was written, which was not in the future."""
    fix = "set the clock, for example by: sudo timedatectl set-ntp true"
    today = datetime.fromtimestamp(now_s, UTC)
    text = f"{today:%Y-%m-%d %H:%M} UTC"
    if now_s < installed_s - CLOCK_SLACK_S:
        return Finding(
            name="clock", level="fail", text=f"{text} is before Shoal was installed", fix=fix
        )
    if today.year >= CLOCK_YEAR_MAX:
        return Finding(name="clock", level="fail", text=f"{text} is far in the future", fix=fix)
    return Finding(name="clock", level="ok", text=text)


def judge_peer_clocks(ahead_s: Mapping[str, float]) -> Finding:
    """`ahead_s`: by how much a server's start lies in our future, by its short name."""
    wrong = {peer: ahead for peer, ahead in ahead_s.items() if ahead > CLOCK_SLACK_S}
    if not wrong:
        return Finding(name="clocks", level="ok", text="no server started in our future")
    names = ", ".join(f"{peer} ({ahead:.0f} s)" for peer, ahead in sorted(wrong.items()))
    return Finding(
        name="clocks",
        level="warn",
        text=f"servers that started in our future: {names}",
        fix="this clock is late, or theirs is early: invites may be refused; set it by NTP",
    )


def judge_port(asked: str, bound: str | None, error: str, outside: str | None) -> Finding:
    """`bound`: where listening worked; `outside`: this machine's address for others."""
    if bound is None:
        return Finding(
            name="port",
            level="fail",
            text=error if asked in error else f"can't listen on {asked}: {error}",
            fix="choose another port, or end the program that has it",
        )
    host, _, port = bound.rpartition(":")
    host = host.rpartition("//")[2].strip("[]")
    if _is_loopback(host):
        return Finding(
            name="port",
            level="ok",
            text=f"can listen on {asked}, for this machine only (others: --listen "
            "tcp://0.0.0.0:PORT)",
        )
    where = f"; others may reach it at {outside}:{port}" if outside else ""
    return Finding(
        name="port",
        level="ok",
        text=f"can listen on {asked}{where}, if no firewall or router is in between",
    )


def judge_join(address: str, rtt_s: float | None, error: str) -> Finding:
    """One address of --join: how far away it is, or why it can't be used."""
    if rtt_s is None:
        return Finding(
            name="join",
            level="fail",
            text=error if address in error else f"{address}: {error}",
            fix="is that server up, is its port open to you, is the address the one of its "
            "ready line, and is it the same --swarm or --invite?",
        )
    text = f"{address}: {rtt_s * 1000:.1f} ms there and back"
    if rtt_s > SLOW_RTT_S:
        return Finding(
            name="join",
            level="warn",
            text=text,
            fix="every token takes longer than that; look for nearer servers",
        )
    return Finding(name="join", level="ok", text=text)


def judge_swarm(num_servers: int, silent: Mapping[str, str], missing: Mapping[str, str]) -> Finding:
    """`silent`: why servers don't answer, by short name; `missing` blocks, by model."""
    problems = [f"{peer} does not answer ({why})" for peer, why in sorted(silent.items())]
    problems += [f"nobody serves blocks {blocks} of {model}" for model, blocks in missing.items()]
    if not problems:
        return Finding(name="swarm", level="ok", text=f"servers known: {num_servers}; all answer")
    return Finding(
        name="swarm",
        level="warn",
        text=f"servers known: {num_servers}; {'; '.join(problems)}",
        fix="shoal serve MODEL --num-blocks N --join ADDR goes where blocks are missing; "
        "servers that don't answer are forgotten after a while",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
