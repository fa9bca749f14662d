"""The `shoal serve` lines that make a placement real."""

from __future__ import annotations

import shlex
from typing import Final

from shoal.base.spans import Span
from shoal.cli.plan_file import Cluster, PlannedServer
from shoal.cli.plan_model import PAGE_TOKENS
from shoal.plan.placement import Placement, free_bytes
from shoal.plan.proposal import Proposal
from shoal.plan.spec import Problem

SPARE: Final = 2
"""Room for this many times the planned sessions,"""

SESSIONS: Final = 64
"""or for so many, whatever is more, as far as memory goes: larger passes gain little."""

MODEL: Final = '"$MODEL"'
MODEL_LINE: Final = "# MODEL: a directory, a .gguf file, a known name or a hub id"
ADDRESS: Final = '"$ADDRESS"'


def command_lines(cluster: Cluster, placement: Placement) -> tuple[str, ...]:
    """A shell text: per server a comment with its name, and its command.

    The first server begins the swarm; the others join by the address that its ready line
    prints, to be put into $ADDRESS. $MODEL stands for a model that has no name.
    """
    lines = [] if cluster.model.given is not None else [MODEL_LINE]
    for turn, (server, span) in enumerate(placement.hosted()):
        name = cluster.servers[server].name
        lines.append(f"# on {name}")
        lines.append(_command(cluster, server, span, join=ADDRESS if turn else None))
        if not turn and len(placement.hosted()) > 1:
            lines.append(f"# ADDRESS: the address on the ready line of {name}")
    return tuple(lines)


def move_lines(cluster: Cluster, proposal: Proposal) -> tuple[str, ...]:
    """The same for a live swarm: only servers that move.

    Each joins by the address of one that stays, or moves later. Started anew, a server has a
    new identity and so a new address: if all move, the last joins by the first one's.
    """
    moves = proposal.change.moves if proposal.change is not None else ()
    moving = {move.server for move in moves}
    staying = [server for server in range(len(cluster.servers)) if server not in moving]
    lines: list[str] = []
    for turn, move in enumerate(moves):
        name = cluster.servers[move.server].name
        if move.after is None:
            lines.append(f"# {name}: stop it")
            continue
        lines.append(f"# {name}: stop it (its sessions go on elsewhere), then")
        there = [*staying, *(later.server for later in moves[turn + 1 :])]
        join = shlex.quote(cluster.servers[there[0]].address) if there else None
        if not there and turn:
            first = cluster.servers[moves[0].server].name
            lines.append(f"# ADDRESS: the address on the new ready line of {first}")
            join = ADDRESS
        lines.append(_command(cluster, move.server, move.after, join=join))
    if lines and cluster.model.given is None:
        lines.insert(0, MODEL_LINE)
    return tuple(lines)


def _command(cluster: Cluster, server: int, span: Span, *, join: str | None) -> str:
    model, planned = cluster.model, cluster.servers[server]
    words = ["shoal", "serve", MODEL if model.given is None else shlex.quote(model.given)]
    words += ["--blocks", f"{span.start}:{span.end}"]
    if model.dtype != "float32":
        words += ["--dtype", model.dtype]
    if model.quantize != "none":
        words += ["--quantize", model.quantize]
    if planned.device != "cpu":
        words += ["--device", planned.device]
    words += ["--cache-tokens", str(cache_tokens(cluster.problem, server, span))]
    words += _addresses(planned)
    if join is not None:
        words += ["--join", join]
    return " ".join(words)


def _addresses(planned: PlannedServer) -> list[str]:
    words = ["--listen", shlex.quote(planned.listen)]
    if planned.announce is not None:
        words += ["--announce", shlex.quote(planned.announce)]
    return words


def cache_tokens(problem: Problem, server: int, span: Span) -> int:
    """Positions for its KV cache, in whole pages, one at least."""
    workload = problem.workload
    each = problem.session_bytes(span)
    tokens = -(-(workload.tokens_in + workload.tokens_out) // PAGE_TOKENS) * PAGE_TOKENS
    free = free_bytes(problem, _only(problem, server, span), server)
    wanted = max(SESSIONS, SPARE * workload.sessions)
    sessions = min(free // each, wanted) if each else wanted
    return max(PAGE_TOKENS, sessions * tokens)


def _only(problem: Problem, server: int, span: Span) -> Placement:
    return Placement(spans=(None,) * len(problem.servers)).moved(server, span)
