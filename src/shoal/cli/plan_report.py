"""A proposal as `shoal plan --json` prints it."""

from __future__ import annotations

import math
from typing import Any

from shoal.base.spans import Span
from shoal.cli.plan_file import Cluster
from shoal.plan.advice import advise
from shoal.plan.compose import Seated
from shoal.plan.cost import Chain
from shoal.plan.outlook import Outlook
from shoal.plan.proposal import Proposal
from shoal.plan.trying import Tried


def as_dict(cluster: Cluster, proposal: Proposal) -> dict[str, Any]:
    """Everything of a proposal; figures that are infinite are null."""
    problem, best = cluster.problem, proposal.best
    workload = problem.workload
    return {
        "objective": proposal.objective,
        "policy": best.policy,
        "value": _finite(proposal.value),
        "bound": _finite(proposal.bound),
        "gap": _finite(proposal.gap),
        "workload": {
            "tokens_in": workload.tokens_in,
            "tokens_out": workload.tokens_out,
            "requests_per_s": workload.requests_per_s,
            "sessions": workload.sessions,
        },
        "figures": figures_dict(best.outlook),
        "servers": [_server_dict(cluster, proposal, one) for one in range(len(problem.servers))],
        "chains": [_chain_dict(cluster, one) for one in best.outlook.chains],
        "replicas": list(best.outlook.replicas),
        "splits": [
            {"servers": one.num_servers, "step_s": one.seconds, "chain": _hops(cluster, one.chain)}
            for one in proposal.splits
        ],
        "rules": [_tried_dict(one) for one in proposal.tried],
        "failed": dict(proposal.failed),
        "skipped": list(proposal.skipped),
        "front": [_tried_dict(one) for one in proposal.front],
        "present": None if proposal.present is None else figures_dict(proposal.present),
        "change": _change_dict(cluster, proposal),
        "advice": list(advise(problem, proposal)),
        "notes": list(cluster.notes),
    }


def figures_dict(outlook: Outlook) -> dict[str, Any]:
    """The figures of a placement."""
    low, high = outlook.response_s or (None, None)
    return {
        "unplaced": outlook.unplaced,
        "alone_s": _finite(outlook.alone_s),
        "step_s": _finite(outlook.step_s),
        "tokens_per_s": _finite(outlook.tokens_per_s),
        "service_s": _finite(outlook.service_s),
        "response_low_s": _finite(low),
        "response_high_s": _finite(high),
        "requests_per_s_max": _finite(outlook.requests_per_s_max),
        "rows_per_s": _finite(outlook.rows_per_s),
        "rows_unlinked_per_s": _finite(outlook.rows_unlinked_per_s),
    }


def _server_dict(cluster: Cluster, proposal: Proposal, server: int) -> dict[str, Any]:
    spec, use = cluster.problem.servers[server], proposal.best.outlook.servers[server]
    return {
        "name": spec.name,
        "blocks": _blocks(use.span),
        "memory_bytes": use.memory_bytes,
        "weight_bytes": use.weight_bytes,
        "session_bytes": use.session_bytes,
        "sessions": use.sessions,
        "seats": use.seats,
        "decode_s_per_block": spec.decode.at(1),
        "is_estimated": cluster.servers[server].is_estimated,
    }


def _chain_dict(cluster: Cluster, one: Seated) -> dict[str, Any]:
    return {
        "sessions": one.seats,
        "step_s": _finite(one.seconds),
        "hops": _hops(cluster, one.chain),
    }


def _hops(cluster: Cluster, chain: Chain) -> list[dict[str, Any]]:
    return [
        {"server": cluster.problem.servers[hop.server].name, "blocks": _blocks(hop.span)}
        for hop in chain
    ]


def _tried_dict(one: Tried) -> dict[str, Any]:
    return {
        "policy": one.policy,
        "blocks": [_blocks(span) for span in one.placement.spans],
        **figures_dict(one.outlook),
    }


def _change_dict(cluster: Cluster, proposal: Proposal) -> dict[str, Any] | None:
    change = proposal.change
    if change is None:
        return None
    return {
        "load_bytes": change.load_bytes,
        "load_s": change.load_s,
        "is_seamless": change.is_seamless,
        "moves": [
            {
                "server": cluster.problem.servers[move.server].name,
                "from": _blocks(move.before),
                "to": _blocks(move.after),
                "load_bytes": move.load_bytes,
                "load_s": move.load_s,
                "uncovers": [_blocks(span) for span in move.uncovers],
            }
            for move in change.moves
        ],
    }


def _blocks(span: Span | None) -> list[int] | None:
    return None if span is None else [span.start, span.end]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
