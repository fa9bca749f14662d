"""A proposal for a person: tables, figures, advice."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Final

from shoal.base.spans import Span
from shoal.cli.plan_file import Cluster
from shoal.cli.sizes import size_text
from shoal.plan.advice import advise, rate_text, seconds_text
from shoal.plan.compose import Seated
from shoal.plan.cost import Chain
from shoal.plan.outlook import Outlook, ServerUse
from shoal.plan.proposal import Proposal
from shoal.plan.trying import PRESENT, Tried

CHAINS_MAX: Final = 8
HOPS_MAX: Final = 6
REPLICAS_MAX: Final = 8
"""What a screen takes of each; --json has all."""

REACHED: Final = 0.005
"""A gap to the bound that rounds to none."""

PIPE_WIDTH: Final = 160
"""A pipe has no width: rows must not be cut there."""

GOALS: Final = {
    "latency": "seconds per token",
    "response": "response time",
    "throughput": "tokens per second",
    "pareto": "both latency and throughput",
}


def show(cluster: Cluster, proposal: Proposal) -> None:
    """Print everything."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, soft_wrap=False)
    for part in renderables(cluster, proposal):
        console.print(part)


def renderables(cluster: Cluster, proposal: Proposal) -> list[Any]:
    """What rich prints, from top to bottom."""
    from rich.text import Text

    parts: list[Any] = [Text(line, style="bold") for line in advise(cluster.problem, proposal)]
    parts += [Text(""), _server_table(cluster, proposal), _chain_table(cluster, proposal)]
    if len(proposal.splits) > 1:
        parts.append(_split_table(cluster, proposal))
    parts.append(_tried_table(proposal))
    for name, why in proposal.failed.items():
        parts.append(Text(f"{name} found none: {why.partition(' (')[0]}", style="dim"))
    parts += [Text(line) for line in figure_lines(cluster, proposal)]
    if proposal.change is not None and proposal.change.moves:
        parts.append(_move_table(cluster, proposal))
    if proposal.skipped:
        parts.append(Text(f"Not tried for want of time: {', '.join(proposal.skipped)}."))
    parts += [Text(note, style="dim") for note in cluster.notes]
    return parts


def figure_lines(cluster: Cluster, proposal: Proposal) -> list[str]:
    """The figures of the proposal, one line each."""
    outlook, workload = proposal.best.outlook, cluster.problem.workload
    sessions = "1 session" if workload.sessions == 1 else f"{workload.sessions} sessions"
    lines = [
        f"one session alone        {_step_text(outlook.alone_s)}",
        f"{f'{sessions} at once':<24} {_step_text(outlook.step_s)} each, "
        f"{rate_text(outlook.tokens_per_s)} tokens/s together",
        f"{f'{workload.tokens_in} + {workload.tokens_out} tokens':<24} "
        f"{seconds_text(outlook.service_s)} from prompt to last token",
    ]
    if outlook.response_s is not None:
        low, high = outlook.response_s
        worst = "" if high < low * 1.01 else f" ({seconds_text(high)} if slow chains came first)"
        rate = f"at {workload.requests_per_s:g} requests/s"
        lines.append(f"{rate:<24} {seconds_text(low)} mean response{worst}")
    lines.append(
        f"as many as fit           {rate_text(outlook.rows_per_s)} tokens/s, "
        f"{_many(outlook.requests_per_s_max)} requests/s"
    )
    lines.append(_bound_line(proposal))
    lines.append(f"replicas                 {replicas_text(outlook.replicas)}")
    return lines


def _bound_line(proposal: Proposal) -> str:
    if proposal.objective == "throughput":
        bound = f"{rate_text(proposal.bound)} tokens/s"
        best = f"nothing gives more than  {bound}"
    else:
        best = f"nothing is faster than   {seconds_text(proposal.bound)}"
        best += " per request" if proposal.objective == "response" else " per token"
    if proposal.gap < REACHED:
        return f"{best}; this plan reaches it"
    return f"{best}; this plan is within {proposal.gap:.0%} of it" if proposal.gap < 1 else best


def replicas_text(counts: Sequence[int]) -> str:
    """For example `3 of [0,10), 2 of [10,30)`."""
    parts, start = [], 0
    for count, group in groupby(counts):
        end = start + len(list(group))
        parts.append(f"{count} of {Span(start, end)}")
        start = end
    if len(parts) > REPLICAS_MAX:
        return (
            f"{min(counts)} to {max(counts)} per block, {sum(counts) / len(counts):.2g} on average"
        )
    return ", ".join(parts)


def _server_table(cluster: Cluster, proposal: Proposal) -> Any:
    title = f"placement by {proposal.best.policy}, best found for {GOALS[proposal.objective]}"
    if proposal.best.policy == PRESENT:
        title = f"the present placement, kept for {GOALS[proposal.objective]}"
    table = _table(title, ("server", "blocks", "weights", "caches", "memory", "sessions", "speed"))
    for server, use in enumerate(proposal.best.outlook.servers):
        spec, planned = cluster.problem.servers[server], cluster.servers[server]
        mark = "~" if planned.is_estimated else ""
        _row(
            table,
            spec.name,
            "-" if use.span is None else str(use.span),
            size_text(use.weight_bytes) if use.span else "",
            size_text(use.session_bytes) if use.session_bytes else "",
            _memory_text(use),
            f"{use.sessions} of {_many(use.seats)}" if use.span else "",
            f"{mark}{seconds_text(spec.decode.at(1))} a block",
        )
    return table


def _memory_text(use: ServerUse) -> str:
    taken = use.weight_bytes + use.session_bytes
    return f"{taken / use.memory_bytes:.0%} of {size_text(use.memory_bytes)}"


def _chain_table(cluster: Cluster, proposal: Proposal) -> Any:
    table = _table("where sessions run", ("sessions", "per token", "chain"))
    chains: Sequence[Seated] = proposal.best.outlook.chains
    for one in chains[:CHAINS_MAX]:
        _row(table, str(one.seats), seconds_text(one.seconds), chain_text(cluster, one.chain))
    if len(chains) > CHAINS_MAX:
        rest = sum(one.seats for one in chains[CHAINS_MAX:])
        _row(table, str(rest), "", f"on {len(chains) - CHAINS_MAX} more chains")
    return table


def _split_table(cluster: Cluster, proposal: Proposal) -> Any:
    table = _table("one session over so many servers", ("servers", "per token", "chain"))
    for one in proposal.splits:
        times = (str(one.num_servers), seconds_text(one.seconds))
        _row(table, *times, chain_text(cluster, one.chain))
    return table


def _tried_table(proposal: Proposal) -> Any:
    shown: Sequence[Tried] = proposal.front or proposal.tried
    title = "no placement is better in both" if proposal.front else "rules tried, the best first"
    names = ("rule", "per token", "per request", "response", "tokens/s", "no room for")
    table = _table(title, names)
    for one in shown:
        outlook: Outlook = one.outlook
        is_best = one is proposal.best and len(shown) > 1
        _row(
            table,
            one.policy + (" (chosen)" if is_best else ""),
            seconds_text(outlook.step_s),
            seconds_text(outlook.service_s),
            "" if outlook.response_s is None else seconds_text(outlook.response_s[0]),
            rate_text(outlook.rows_per_s),
            str(outlook.unplaced or ""),
        )
    return table


def _move_table(cluster: Cluster, proposal: Proposal) -> Any:
    table = _table("moves, in this order", ("server", "from", "to", "loads", "takes", "meanwhile"))
    for move in proposal.change.moves if proposal.change is not None else ():
        missing = f"nobody hosts {' and '.join(map(str, move.uncovers))}" if move.uncovers else ""
        _row(
            table,
            cluster.problem.servers[move.server].name,
            "-" if move.before is None else str(move.before),
            "-" if move.after is None else str(move.after),
            size_text(move.load_bytes),
            seconds_text(move.load_s),
            missing,
        )
    return table


def chain_text(cluster: Cluster, chain: Chain) -> str:
    """For example `a [0,10) > b [10,30)`."""
    hops = [f"{cluster.problem.servers[hop.server].name} {hop.span}" for hop in chain]
    if len(hops) > HOPS_MAX:
        hops[HOPS_MAX - 1 : -1] = [f"... {len(hops) - HOPS_MAX} more ..."]
    return " > ".join(hops)


def _step_text(seconds: float) -> str:
    if math.isinf(seconds):
        return "no room"
    rate = f" ({rate_text(1 / seconds)} tokens/s)" if seconds else ""
    return f"{seconds_text(seconds)} per token{rate}"


def _many(count: float) -> str:
    return rate_text(count) if count < 1e4 else "over 10,000"


def _table(title: str, names: Iterable[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name)
    return table


def _row(table: Any, *cells: str) -> None:
    from rich.markup import escape

    table.add_row(*(escape(cell) for cell in cells))
