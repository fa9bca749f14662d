"""What `shoal doctor` looks at: collects facts, and hands them to `findings`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

import shoal
from shoal.base.errors import ConfigError, PeerTimeout, PeerUnreachable, ShoalError
from shoal.base.ids import short
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.base.spans import Span
from shoal.cli.findings import (
    Finding,
    Level,
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
from shoal.cli.joining import SwarmChoice, visit, wall_clock
from shoal.cli.machine import Machine, disk_free_bytes, look_at_machine, own_address
from shoal.cli.models import cache_dir, open_outline
from shoal.cli.status import as_dicts, ask_all, measure_rtt
from shoal.net.address import Address, parse_listen
from shoal.net.channel import PURPOSE_CONTROL, Channel, open_channel
from shoal.net.identity import Identity
from shoal.net.tcp import TcpTransport

EXTRAS: Final = ("torch", "cli")
"""Optional parts of the package that every command here needs."""

TOLD: Final = ("shoal", "torch", "transformers", "safetensors", "tokenizers")
NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/version")
CACHE_TOKENS: Final = 8192
"""As `shoal serve` keeps by default."""


def examine_machine(omp: str | None) -> list[Finding]:
    """Packages, device, threads, memory, disk, limits, clock.

    `omp` is what OMP_NUM_THREADS was before this command.
    """
    machine = look_at_machine()
    folder = cache_dir()
    free_bytes, is_writable = disk_free_bytes(folder)
    installed_s = Path(shoal.__file__).stat().st_mtime
    problems = _package_problems()
    findings = [judge_packages(problems, _versions())]
    if "torch" not in problems:
        findings.append(_examine_device())
    return [
        *findings,
        judge_threads(machine, omp),
        judge_memory(machine),
        judge_disk(str(folder), free_bytes, is_writable=is_writable),
        judge_open_files(machine),
        judge_clock(wall_clock(), installed_s),
    ]


def _versions() -> dict[str, str]:
    versions = {"shoal": shoal.__version__}
    for name in TOLD[1:]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # judged as missing elsewhere
    return versions


def _package_problems() -> dict[str, str]:
    """What is missing or outside its range, by name."""
    problems = {}
    for name, wanted in _requirements():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems[name] = "not installed"
            continue
        if not _is_within(version, wanted):
            problems[name] = f"{version} is not {wanted}"
    return problems


def _requirements() -> Iterator[tuple[str, str]]:
    """(name, range) of what we need, our extras included."""
    for text in metadata.requires("shoal") or []:
        requirement, _, marker = (part.strip() for part in text.partition(";"))
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if extra is not None and extra[1] not in EXTRAS:
            continue
        match = re.match(r"[\w.-]+", requirement)
        if match is not None:
            yield match[0], requirement[match.end() :].strip()


def _is_within(version: str, wanted: str) -> bool:
    """Whether a release is in a range of >= and <, which is all that we write."""
    release = _numbers(version)
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        sign, bound = part.rstrip("0123456789."), _numbers(part.lstrip("<>=~! "))
        if sign == ">=" and release < bound:
            return False
        if sign == "<" and release >= bound:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _examine_device() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(
            name="device",
            level="fail",
            text=f"torch is there and can't be loaded: {error}",
            fix="install torch again: https://pytorch.org/get-started/locally/",
        )
    gpu = None
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        gpu = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB"
    return judge_device(
        gpu,
        has_cuda_build=torch.version.cuda is not None,
        has_nvidia_driver=NVIDIA_DRIVER.exists(),
    )


async def examine_port(listen: str) -> Finding:
    """Whether a server could listen there."""

    async def turn_away(stream: object) -> None:
        """Nobody is expected in this moment."""

    transport = TcpTransport(Identity.generate())
    try:
        listener = await transport.listen(parse_listen(listen), turn_away)
    except ShoalError as error:
        return judge_port(listen, None, error.detail, None)
    finally:
        await transport.close()
    bound = f"tcp://{listener.address.host}:{listener.address.port}"
    return judge_port(listen, bound, "", own_address())


def examine_model(given: str) -> list[Finding]:
    """Whether a model can be read, served and talked with here."""
    try:
        source = open_outline(given)
    except (ShoalError, ImportError) as error:
        return [Finding(name="model", level="fail", text=str(error), fix=_model_fix(error))]
    from shoal.model.facts import model_facts

    try:
        facts = model_facts(source.config)
    except ShoalError as error:
        return [Finding(name="model", level="fail", text=error.detail, fix=_model_fix(error))]
    support = facts.support
    findings = [
        Finding(
            name="model",
            level="ok" if support.is_tested else "warn",
            text=f"{support.architecture}, {facts.num_blocks} blocks, {support.engine} engine"
            + ("" if support.is_tested else ", not in our tests"),
            fix="" if support.is_tested else "try it: a start-up probe refuses what goes wrong",
        )
    ]
    machine = look_at_machine()
    free_bytes = _free(machine)
    if free_bytes is not None:
        fit = facts.blocks_that_fit(free_bytes / 2**30, "float32", CACHE_TOKENS)
        findings.append(
            Finding(
                name="blocks",
                level="ok" if fit else "warn",
                text=f"{fit} of {facts.num_blocks} fit into the free memory in float32 with a "
                f"cache of {CACHE_TOKENS} tokens",
                fix="" if fit else "--dtype bfloat16, --quantize int8, or fewer --cache-tokens",
            )
        )
    try:
        has_template = bool(getattr(source.tokenizer(), "chat_template", None))
    except ShoalError as error:
        fix = "generate and chat need a tokenizer; serving does not"
        return [*findings, Finding(name="tokenizer", level="warn", text=error.detail, fix=fix)]
    text = "with a chat template" if has_template else "no chat template"
    fix = "" if has_template else "shoal generate works; shoal chat needs --template FILE"
    level: Level = "ok" if has_template else "warn"
    return [*findings, Finding(name="tokenizer", level=level, text=text, fix=fix)]


def _free(machine: Machine) -> int | None:
    if machine.memory_free_bytes is not None:
        return machine.memory_free_bytes
    return machine.memory_bytes


def _model_fix(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "pip install --upgrade 'shoal[torch,cli]'"
    return "see: shoal model list, shoal model inspect --families"


async def examine_swarm(choice: SwarmChoice) -> list[Finding]:
    """Each join, and what those that answer know of the swarm."""
    findings = list(await asyncio.gather(*(_examine_join(choice, one) for one in choice.joins)))
    if not choice.is_lan and all(finding.level == "fail" for finding in findings):
        return findings
    now_s = wall_clock()
    try:
        async with visit(choice) as visitor:
            seen = await ask_all(visitor)
    except PeerUnreachable as error:
        fix = "is a server up that was started with --lan, and does this network pass multicasts?"
        return [*findings, Finding(name="lan", level="fail", text=error.detail, fix=fix)]
    silent = {short(one.record.peer): one.error for one in seen if one.error}
    ahead_s = {short(one.record.peer): one.record.boot_ms / 1000 - now_s for one in seen}
    missing = {
        model["model"][:12]: ", ".join(str(Span(*span)) for span in model["missing"])
        for model in as_dicts(seen)
        if model["missing"]
    }
    return [*findings, judge_swarm(len(seen), silent, missing), judge_peer_clocks(ahead_s)]


async def _examine_join(choice: SwarmChoice, address: Address) -> Finding:
    identity = Identity.generate()
    transport = TcpTransport(identity)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            channel: Channel = await open_channel(
                transport, address, PURPOSE_CONTROL, choice.pass_for(identity)
            )
            rtt_s = await measure_rtt(channel)
            channel.close()
    except ConfigError:
        raise
    except TimeoutError:
        error: ShoalError = PeerTimeout(f"no answer within {CALL_TIMEOUT_S:g} s")
        return judge_join(str(address), None, error.detail)
    except ShoalError as failure:
        return judge_join(str(address), None, failure.detail)
    finally:
        await transport.close()
    return judge_join(str(address), rtt_s, "")
