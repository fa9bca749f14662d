"""cluster.toml: a model, servers, links and a workload, as a problem of placement.

docs/planning.md describes every key. What is wrong with a file is told with its line and
key (`shoal.cli.plan_reader`); what a file leaves out is estimated where it can be
(`shoal.plan.devices`, `shoal.plan.distance`), and the plan says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from shoal.base.errors import ConfigError, NoRouteError
from shoal.base.spans import Span, parse_span
from shoal.cli.plan_model import PlannedModel, read_model
from shoal.cli.plan_places import (
    Endpoint,
    Places,
    read_endpoint,
    read_places,
    site_positions,
)
from shoal.cli.plan_reader import Table
from shoal.net.address import parse_listen
from shoal.plan.change import LOAD_BYTES_PER_S
from shoal.plan.cost import HOP_S
from shoal.plan.devices import (
    DEVICES,
    BlockTimes,
    BlockWork,
    Device,
    decode_between,
    estimate,
)
from shoal.plan.place.cgbp import choose_sessions
from shoal.plan.placement import Placement, check_placement
from shoal.plan.spec import DecodeTimes, Flow, Links, Problem, ServerSpec, Workload
from shoal.plan.trying import OBJECTIVES, Objective

SERVERS_MAX: Final = 2000
"""Planning for more takes hours."""

USABLE: Final = 0.9
"""Of a device's usual memory, what weights and caches may take if the file says nothing."""

TOKENS_IN: Final = 512
TOKENS_OUT: Final = 256
"""A question with some context and its answer."""

TABLES: Final = ("model", "workload", "links", "clients", "servers")

NAMES_MAX: Final = 8
"""Servers that a note names."""

LISTEN: Final = "tcp://0.0.0.0:4001"
"""Where a server listens if the file says nothing: for everybody who can reach it."""

FLOWS: Final[tuple[Flow, ...]] = ("push", "hub")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedServer:
    """What a command line for a server needs, beside its blocks."""

    name: str
    device: str = "cpu"
    listen: str = LISTEN
    announce: str | None = None
    is_estimated: bool = False
    """Its speed is an estimate from data sheets."""
    address: str = ""
    """In a live swarm: where it is now, as others join it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A file that was read and checked."""

    problem: Problem
    model: PlannedModel
    servers: tuple[PlannedServer, ...]
    load_bytes_per_s: tuple[float, ...]
    present: Placement | None
    objective: Objective | None
    notes: tuple[str, ...] = ()
    """What the numbers rest on, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What flags say about the workload, over the file."""

    tokens_in: int | None = None
    tokens_out: int | None = None
    requests_per_s: float | None = None
    sessions: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One server of the file, after `count` was spelled out."""

    table: Table
    spec: ServerSpec
    server: PlannedServer
    endpoint: Endpoint
    load_bytes_per_s: float
    span: Span | None


def read_cluster(top: Table, asked: Asked | None = None) -> Cluster:
    """The cluster of a file.

    Raises:
        ConfigError: anything that can't be, with file, line and key.
        ModelError: the model that it names can't be opened.
    """
    asked = asked or Asked()
    top.asked.update(TABLES)
    top.done()
    objective, workload = _workload(top.table("workload"), asked)
    model = read_model(top.table("model"), top.file.parent)
    links = top.table("links")
    places = read_places(links)
    entries = _servers(top, model, workload, places)
    clients = [read_endpoint(one, f"client {index}", places) for index, one in _clients(top)]
    flow = links.choice("flow", FLOWS, "push")
    handling_s = links.number("handling_ms", HOP_S * 1e3, high=1e5) / 1e3
    links.done()
    known = site_positions([*(entry.endpoint for entry in entries), *clients])
    ends = [entry.endpoint.placed(known) for entry in entries]
    clients = [client.placed(known) for client in clients]
    places.check_names([*ends, *clients])
    problem = Problem(
        model=model.spec,
        servers=tuple(entry.spec for entry in entries),
        links=Links(
            client_rtt_s=tuple(
                tuple(places.rtt_s(client, end) for end in ends) for client in clients
            ),
            server_rtt_s=tuple(tuple(places.rtt_s(one, end) for end in ends) for one in ends)
            if flow == "push"
            else None,
            server_bytes_per_s=places.bytes_per_s(ends, flow),
            flow=flow,
            handling_s=handling_s,
            prefill_handling_s=handling_s,
        ),
        workload=workload,
    )
    if asked.sessions is None and "sessions" not in top.table("workload"):
        problem = _with_sessions(problem)
    return Cluster(
        problem=problem,
        model=model,
        servers=tuple(entry.server for entry in entries),
        load_bytes_per_s=tuple(entry.load_bytes_per_s for entry in entries),
        present=_present(problem, entries),
        objective=objective,
        notes=_notes(entries, places),
    )


def _workload(table: Table, asked: Asked) -> tuple[Objective | None, Workload]:
    objective = table.choice("objective", OBJECTIVES) if "objective" in table else None
    tokens_in = table.integer("tokens_in", TOKENS_IN, high=1 << 20)
    tokens_out = table.integer("tokens_out", TOKENS_OUT, high=1 << 20)
    requests_per_s = table.number("requests_per_s", 0.0, high=1e6)
    sessions = table.integer("sessions", 1, high=100_000)
    table.asked.add("objective")
    table.done()
    return objective, Workload(
        tokens_in=asked.tokens_in or tokens_in,
        tokens_out=asked.tokens_out or tokens_out,
        requests_per_s=requests_per_s if asked.requests_per_s is None else asked.requests_per_s,
        sessions=asked.sessions or sessions,
    )


def _with_sessions(problem: Problem) -> Problem:
    """With as many concurrent sessions as the rate suggests (BPRR's choice of R)."""
    if not problem.workload.requests_per_s:
        return problem
    try:
        sessions = choose_sessions(problem)
    except NoRouteError:
        return problem  # planning will say what is missing
    return replace(problem, workload=replace(problem.workload, sessions=sessions))


def _clients(top: Table) -> list[tuple[int, Table]]:
    tables = top.tables("clients")
    if not tables:
        # One that nothing is known about: as far from everybody as the file says at all.
        nothing = replace(top, path=("clients",), content={}, asked=set())
        return [(1, nothing)]
    return list(enumerate(tables, 1))


def _servers(
    top: Table, model: PlannedModel, workload: Workload, places: Places
) -> tuple[_Entry, ...]:
    tables = top.tables("servers")
    if not tables:
        raise top.fail("no servers: add a [[servers]] table for each")
    entries: list[_Entry] = []
    names: set[str] = set()
    for index, table in enumerate(tables, 1):
        for entry in _alike(table, index, model, workload, places):
            if entry.server.name in names:
                raise table.fail(f"two servers are called {entry.server.name!r}", "name")
            names.add(entry.server.name)
            entries.append(entry)
        if len(entries) > SERVERS_MAX:
            raise table.fail(f"more than {SERVERS_MAX} servers")
    return tuple(entries)


def _alike(
    table: Table, index: int, model: PlannedModel, workload: Workload, places: Places
) -> list[_Entry]:
    """The servers of one table: one, or `count` of them."""
    name = table.text("name", f"server-{index}")
    number = table.integer("count", 1, high=SERVERS_MAX)
    spec, device = _spec(table, name, model, workload, places)
    span = _span(table, model)
    if number > 1 and span is not None:
        raise table.fail("servers of one table can't all be at the same place; write each", "count")
    endpoint = read_endpoint(table, name, places)
    server = _planned(table, name, device)
    load = table.rate("load", min(spec.received_bytes_per_s, LOAD_BYTES_PER_S))
    table.done()
    names = [name] if number == 1 else [f"{name}-{one}" for one in range(1, number + 1)]
    return [
        _Entry(
            table=table,
            spec=replace(spec, name=one),
            server=replace(server, name=one),
            endpoint=replace(endpoint, name=one, group=name),
            load_bytes_per_s=load,
            span=span,
        )
        for one in names
    ]


def _planned(table: Table, name: str, device: Device | None) -> PlannedServer:
    """What its command line needs; `device` is what its speed was estimated from."""
    known = DEVICES.get(table.content.get("device", ""))
    runs_on = table.text("runs_on", "cuda" if known is not None and known.is_cuda else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", runs_on) is None:
        raise table.fail(f"{runs_on!r}: write cpu, cuda or cuda:N", "runs_on")
    announce = table.text("announce") if "announce" in table else None
    table.asked.add("announce")
    listen = table.text("listen", LISTEN)
    for key, value in (("listen", listen), ("announce", announce)):
        try:
            if value is not None:
                parse_listen(value)
        except ConfigError as error:
            raise table.checked(key, error) from error
    return PlannedServer(
        name=name,
        device=runs_on,
        listen=listen,
        announce=announce,
        is_estimated=device is not None,
    )


def _spec(
    table: Table, name: str, model: PlannedModel, workload: Workload, places: Places
) -> tuple[ServerSpec, Device | None]:
    """The server, and the device that its speed was estimated from."""
    device = _device(table)
    if "memory" in table or device is None or device.memory_bytes is None:
        memory = table.size("memory")
    else:
        table.asked.add("memory")
        memory = int(device.memory_bytes * USABLE)
    times, is_measured = _times(table, device, model, workload)
    link = table.rate("link", places.link_bytes_per_s)
    most = table.integer("blocks_max", model.spec.num_blocks, high=1 << 16)
    spec = ServerSpec(
        name=name,
        memory_bytes=memory,
        decode=times.decode,
        prefill_s_per_block=times.prefill_s_per_block,
        prefill_s_per_block_token=times.prefill_s_per_block_token,
        link_bytes_per_s=link,
        uplink_bytes_per_s=table.rate("uplink", places.uplink_bytes_per_s),
        downlink_bytes_per_s=table.rate("downlink", places.downlink_bytes_per_s),
        num_blocks_max=most,
    )
    return spec, None if is_measured else device


def _device(table: Table) -> Device | None:
    known = DEVICES[table.choice("device", list(DEVICES))] if "device" in table else None
    table.asked.add("device")
    if "bandwidth" not in table and "tflops" not in table:
        table.asked.update(("bandwidth", "tflops"))
        return known
    if known is not None:
        return replace(
            known,
            bytes_per_s=table.rate("bandwidth", known.bytes_per_s),
            flops_per_s=table.positive("tflops", known.flops_per_s / 1e12) * 1e12,
        )
    return Device(bytes_per_s=table.rate("bandwidth"), flops_per_s=table.positive("tflops") * 1e12)


def _times(
    table: Table, device: Device | None, model: PlannedModel, workload: Workload
) -> tuple[BlockTimes, bool]:
    """The times of a block, and whether the file gives them."""
    guess = None
    if device is not None:
        work = BlockWork(
            weight_bytes=max(model.spec.weight_bytes) * model.active,
            params=model.params_per_block * model.active,
            context_bytes=_context_bytes(model, workload),
        )
        guess = estimate(device, work)
    if "decode_ms" not in table:
        if guess is None:
            raise table.fail(
                "its speed is missing: give decode_ms (per block), or bandwidth and tflops, or "
                f"a device ({', '.join(DEVICES)})"
            )
        for key in ("decode_ms", "prefill_ms", "prefill_fixed_ms"):
            if key in table:
                raise table.fail("goes with decode_ms, which is missing", key)
        table.asked.update(("decode_ms", "prefill_ms", "prefill_fixed_ms"))
        return guess, False
    decode = DecodeTimes(points=tuple((batch, ms / 1e3) for batch, ms in table.points("decode_ms")))
    batch, seconds = decode.points[-1]
    # A prompt's rows are one large batch: no slower each than those of the largest measured.
    row_ms = guess.prefill_s_per_block_token * 1e3 if guess else seconds / batch * 1e3
    prefill_s = table.number("prefill_ms", row_ms, high=1e6) / 1e3
    if len(decode.points) == 1 and batch == 1 and "prefill_ms" in table:
        decode = decode_between(seconds, prefill_s)
    return BlockTimes(
        decode=decode,
        prefill_s_per_block=table.number("prefill_fixed_ms", 0.0, high=1e6) / 1e3,
        prefill_s_per_block_token=prefill_s,
    ), True


def _context_bytes(model: PlannedModel, workload: Workload) -> float:
    """What one row reads of the cache in a block, halfway through the answer."""
    tokens = workload.tokens_in + workload.tokens_out // 2
    return max(cache.session_bytes(tokens) for cache in model.spec.caches)


def _span(table: Table, model: PlannedModel) -> Span | None:
    if "blocks" not in table:
        table.asked.add("blocks")
        return None
    try:
        span = parse_span(table.text("blocks"))
    except ConfigError as error:
        raise table.checked("blocks", error) from error
    if span.end > model.spec.num_blocks:
        raise table.fail(f"the model has {model.spec.num_blocks} blocks", "blocks")
    return span


def _present(problem: Problem, entries: tuple[_Entry, ...]) -> Placement | None:
    if all(entry.span is None for entry in entries):
        return None
    placement = Placement(spans=tuple(entry.span for entry in entries))
    for server, entry in enumerate(entries):
        alone: list[Span | None] = [None] * len(entries)
        alone[server] = entry.span
        try:
            check_placement(problem, Placement(spans=tuple(alone)))
        except ConfigError as error:
            raise entry.table.checked("blocks", error) from error
    return placement


def _notes(entries: tuple[_Entry, ...], places: Places) -> tuple[str, ...]:
    notes = []
    guessed = [entry.server.name for entry in entries if entry.server.is_estimated]
    if guessed:
        notes.append(
            f"Speeds of {_some(guessed, entries)} are estimates from data sheets, good to a factor "
            "of two."
        )
    flat = [entry.server.name for entry in entries if len(entry.spec.decode.points) == 1]
    if flat:
        notes.append(
            f"Decode times of {_some(flat, entries)} are for one session: passes of several are "
            "taken to be as quick (give decode_ms by batch, or prefill_ms)."
        )
    if places.has_positions:
        notes.append("Round trips between places are estimates from their distance.")
    return tuple(notes)


def _some(names: list[str], entries: tuple[_Entry, ...]) -> str:
    if len(names) == len(entries):
        return "all servers"
    return ", ".join(names[:NAMES_MAX]) + (", ..." if len(names) > NAMES_MAX else "")
