"""`shoal status`: who serves what, how full and how far away."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import typer

from shoal.base.errors import PeerTimeout, PeerUnreachable, ShoalError
from shoal.base.ids import peer_text
from shoal.base.limits import CALL_TIMEOUT_S
from shoal.base.spans import Span, missing_blocks
from shoal.cli.joining import SwarmChoice, Visitor, visit
from shoal.cli.options import InviteOption, JoinOption, JsonOption, LanOption, SwarmOption
from shoal.discovery.coordinates import from_wire
from shoal.discovery.records import Record
from shoal.net.address import parse_address
from shoal.net.channel import PURPOSE_CONTROL, Channel, open_channel
from shoal.plan.distance import nearest
from shoal.wire.directory import GetLoad, Load
from shoal.wire.messages import Ping

RTT_PINGS: Final = 5
"""The quickest of these counts: the others met other traffic."""

WATCH_S: Final = 2.0
"""Between two looks: often enough to follow, and a few messages per server."""

WATCH_S_MIN: Final = 0.2
"""Anything quicker asks the servers more than it shows a person."""

NEAREST_MAX: Final = 3
"""Servers named as the nearest to each."""

WatchOption = Annotated[bool, typer.Option("--watch", help="Go on looking.")]
IntervalOption = Annotated[
    float, typer.Option(metavar="S", min=WATCH_S_MIN, help="With --watch: seconds between looks.")
]
CountOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Watch, and end after so many looks.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("status")(status)


def status(
    join: JoinOption = None,
    lan: LanOption = False,
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    as_json: JsonOption = False,
    is_watching: WatchOption = False,
    interval: IntervalOption = WATCH_S,
    count: CountOption = None,
) -> None:
    """Show who serves what, and which blocks are missing.

    Cache is counted in positions: how many are free, of how many. The round trip is
    measured from here. A server that does not answer is shown with the reason. --json has,
    besides, each server's coordinate and the servers nearest to it, with round trips between
    them that are estimated from coordinates, and the rate at which others take its bytes (0: not
    known yet).

    With --watch a table follows the swarm until q or Ctrl-C. Without a terminal that is one
    line per model and look instead, or with --json one object per look, with the time in
    at_s (Unix time).

    \b
    Examples:
      shoal status --join tcp://PEERID@10.0.0.5:4001
      shoal status --join ADDR --json
      shoal status --join ADDR --watch
      shoal status --join ADDR --watch --count 10 --json > swarm.jsonl
    """
    choice = SwarmChoice.to_visit(join, swarm, invite, lan)
    if is_watching or count is not None:
        from shoal.cli.watching import WatchSettings, watch_until_stopped

        watch_until_stopped(
            WatchSettings(swarm=choice, interval_s=interval, count=count, is_json=as_json)
        )
        return
    models = as_dicts(asyncio.run(look(choice)))
    if as_json:
        print(json.dumps({"models": models}), flush=True)
    else:
        _print_tables(models)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One server as its record and its own answers describe it."""

    record: Record
    rtt_s: float | None = None
    load: Load | None = None
    error: str = ""


async def look(choice: SwarmChoice) -> list[Seen]:
    """All servers that the joins know, asked one by one.

    Raises:
        PeerUnreachable: none of the joins answers.
    """
    async with visit(choice) as visitor:
        return await ask_all(visitor)


async def ask_all(visitor: Visitor) -> list[Seen]:
    """All servers that are known now, asked one by one."""
    records = [one.record for one in visitor.directory.snapshot().records]
    return list(await asyncio.gather(*(_ask(visitor, record) for record in records)))


async def _ask(visitor: Visitor, record: Record) -> Seen:
    error: ShoalError = PeerUnreachable("no address")
    for text in record.addresses:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                channel = await open_channel(
                    visitor.transport, parse_address(text), PURPOSE_CONTROL, visitor.swarm_pass
                )
                try:
                    return await _measure(channel, record)
                finally:
                    channel.close()
        except TimeoutError:
            error = PeerTimeout(f"no answer within {CALL_TIMEOUT_S:g} s")
        except ShoalError as failure:
            error = failure
    return Seen(record=record, error=error.detail)


async def _measure(channel: Channel, record: Record) -> Seen:
    rtt_s = await measure_rtt(channel)
    await channel.send(GetLoad(RTT_PINGS + 1))
    message, _ = await channel.receive()
    load = message if isinstance(message, Load) else None
    return Seen(record=record, rtt_s=rtt_s, load=load)


async def measure_rtt(channel: Channel) -> float:
    """Seconds that a message takes there and back, at best."""
    clock = asyncio.get_running_loop().time
    rtts = []
    for call in range(1, RTT_PINGS + 1):
        started_s = clock()
        await channel.send(Ping(call))
        await channel.receive()
        rtts.append(clock() - started_s)
    return min(rtts)


def as_dicts(servers: Sequence[Seen]) -> list[dict[str, Any]]:
    """Models with their servers and missing blocks, as `--json` prints them."""
    models: dict[str, list[Seen]] = {}
    for seen in servers:
        models.setdefault(seen.record.model, []).append(seen)
    return [_model_dict(name, seen) for name, seen in sorted(models.items())]


def _model_dict(name: str, servers: Sequence[Seen]) -> dict[str, Any]:
    num_blocks = max(seen.record.num_blocks for seen in servers)
    held = [
        Span(seen.record.start, seen.record.end)
        for seen in servers
        if not seen.error and seen.record.state != "joining"
    ]
    ordered = sorted(servers, key=lambda seen: (seen.record.start, seen.record.end))
    return {
        "model": name,
        "num_blocks": num_blocks,
        "hidden_size": servers[0].record.hidden_size,
        "missing": [[span.start, span.end] for span in missing_blocks(Span(0, num_blocks), held)],
        "servers": _server_dicts(ordered),
    }


def _server_dicts(servers: Sequence[Seen]) -> list[dict[str, Any]]:
    """With the servers that are nearest to each by their coordinates, as far as they have any."""
    near = nearest([from_wire(seen.record.coordinate) for seen in servers], NEAREST_MAX)
    return [
        {
            **_server_dict(seen),
            "nearest": [
                {"peer": peer_text(servers[number].record.peer), "rtt_s": rtt_s}
                for number, rtt_s in own
            ],
        }
        for seen, own in zip(servers, near, strict=True)
    ]


def _place_dict(record: Record) -> dict[str, Any] | None:
    place = record.coordinate
    if place is None:
        return None
    return {"point_s": list(place.point), "height_s": place.height, "error": place.error}


def _server_dict(seen: Seen) -> dict[str, Any]:
    record, load = seen.record, seen.load
    return {
        "peer": peer_text(record.peer),
        "addresses": list(record.addresses),
        "blocks": [record.start, record.end],
        "state": record.state,
        "encodings": list(record.encodings),
        "numerics": record.numerics,
        "is_exact": record.is_exact,
        "version": record.version,
        "head": record.head,
        "adapters": {adapter.label: adapter.name.hex() for adapter in record.adapters},
        "decode_s_per_block": record.decode_s_per_block,
        "cache_tokens": record.cache_tokens if load is None else load.cache_tokens,
        "free_tokens": None if load is None else load.free_tokens,
        "sessions": None if load is None else load.sessions,
        "iterations": None if load is None else load.iterations,
        "queued_tokens": None if load is None else load.queued_tokens,
        "rtt_s": seen.rtt_s,
        "coordinate": _place_dict(record),
        "sent_bytes_per_s": record.sent_bytes_per_s,
        "error": seen.error,
    }


def _print_tables(models: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console

    # A pipe has no width: rows must not be cut there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in renderables(models):
        console.print(part)


def renderables(models: Sequence[dict[str, Any]]) -> list[Any]:
    """What rich prints for a person: a table per model, and what is missing."""
    from rich.text import Text

    parts: list[Any] = [] if models else [Text("no servers")]
    for model in models:
        parts.append(_table(model))
        missing = [f"missing: blocks [{start},{end})" for start, end in model["missing"]]
        served = f"all {model['num_blocks']} blocks are served"
        parts += [Text(line) for line in [*(missing or [served]), *_adapter_lines(model)]]
    return parts


def _adapter_lines(model: dict[str, Any]) -> list[str]:
    """Who serves which adapters."""
    found: dict[tuple[str, str], list[str]] = {}
    for server in model["servers"]:
        for label, name in server["adapters"].items():
            found.setdefault((label, name), []).append(server["peer"][:8])
    return [
        f"adapter {label} ({name[:8]}) at {', '.join(peers)}"
        for (label, name), peers in sorted(found.items())
    ]


def _table(model: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"model {model['model']}", title_justify="left")
    names = ("peer", "blocks", "state", "numerics", "head", "cache free", "sessions", "round trip")
    for name in names:
        table.add_column(name, no_wrap=name in ("peer", "blocks", "state"))
    for server in model["servers"]:
        start, end = server["blocks"]
        is_seen = not server["error"]
        cells = (
            server["peer"][:8],
            f"[{start},{end})",
            server["state"],
            server["numerics"],
            "yes" if server["head"] else "",
            f"{server['free_tokens']} of {server['cache_tokens']}" if is_seen else "",
            str(server["sessions"]) if is_seen else "",
            f"{server['rtt_s'] * 1000:.2f} ms" if is_seen else server["error"],
        )
        table.add_row(*(escape(cell) for cell in cells))
    return table
