"""A proposal in plain sentences: what is fastest, who is needed, whether to move at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from shoal.plan.proposal import Proposal
from shoal.plan.spec import Problem
from shoal.plan.splits import Split
from shoal.plan.trying import PRESENT

BLIND: Final = "flow"
"""The rule to compare with where ways between servers have rates."""

ALIKE: Final = 0.03
"""Times closer than this share are called equal: estimates are no better."""

NAMES_MAX: Final = 4


def advise(problem: Problem, proposal: Proposal) -> tuple[str, ...]:
    """The sentences, the most important first."""
    said = [
        _splitting(problem, proposal.splits),
        _still_split(proposal),
        _needed(problem, proposal),
        *_load(problem, proposal),
        *_links(proposal),
        _move(problem, proposal),
        *_in_danger(proposal),
    ]
    return tuple(sentence for sentence in said if sentence)


def seconds_text(seconds: float) -> str:
    """For example `21.3 ms` or `4.2 s`."""
    if math.isinf(seconds):
        return "never"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def rate_text(rate: float) -> str:
    """So many per second: `7.34`, or `7,340`."""
    return f"{rate:.3g}" if rate < 999.5 else f"{rate:,.0f}"


def names_text(problem: Problem, servers: Sequence[int]) -> str:
    """The servers' names, or how many when they are many."""
    if len(servers) > NAMES_MAX:
        return f"{len(servers)} servers"
    *names, last = (problem.servers[server].name for server in servers)
    return f"{', '.join(names)} and {last}" if names else last


def _splitting(problem: Problem, splits: Sequence[Split]) -> str:
    """Whether fewer servers are faster for one session alone."""
    if not splits:
        return ""
    best = min(splits, key=lambda one: one.seconds)
    most = splits[-1]
    best_text = f"{seconds_text(best.seconds)} per token"
    who = names_text(problem, [hop.server for hop in best.chain])
    verb = "takes" if best.num_servers == 1 else "take"
    if len(splits) == 1:
        if best.num_servers == 1:
            return f"The model fits into one server: {who} takes {best_text}."
        return f"Only {best.num_servers} servers together hold the model: {best_text}."
    fewest = splits[0]
    is_fewest_slower = fewest.seconds > best.seconds * (1 + ALIKE)
    is_most_slower = most.seconds > best.seconds * (1 + ALIKE)
    if is_fewest_slower and is_most_slower:
        return (
            f"{best.num_servers} servers are fastest: for one session {who} {verb} {best_text}; "
            f"over {fewest.num_servers} a token takes {seconds_text(fewest.seconds)}, over "
            f"{most.num_servers} {seconds_text(most.seconds)}."
        )
    if is_most_slower:
        what = "One server is" if best.num_servers == 1 else "Fewer servers are"
        return (
            f"{what} faster: for one session {who} {verb} {best_text}; split over "
            f"{most.num_servers} servers a token takes {seconds_text(most.seconds)}, "
            f"{_longer(most.seconds / best.seconds)}."
        )
    if is_fewest_slower:
        return (
            f"Splitting pays: over {best.num_servers} servers a token takes "
            f"{seconds_text(best.seconds)}, over {fewest.num_servers} "
            f"{seconds_text(fewest.seconds)}."
        )
    return (
        f"How many servers share the model hardly matters for one session: {best_text} over "
        f"{best.num_servers}, {seconds_text(most.seconds)} over {most.num_servers}."
    )


def _still_split(proposal: Proposal) -> str:
    """Why a plan is slower for one session than the fastest split."""
    best = min(proposal.splits, key=lambda one: one.seconds, default=None)
    alone_s = proposal.best.outlook.alone_s
    if best is None or not best.seconds * (1 + ALIKE) < alone_s < math.inf:
        return ""
    if proposal.best.policy == PRESENT:
        return ""
    return (
        f"This plan takes {seconds_text(alone_s)} for one session all the same: it has room for "
        "more at a time."
    )


def _longer(times: float) -> str:
    return f"{times - 1:.0%} longer" if times < 2 else f"{times:.2g} times as long"


def _needed(problem: Problem, proposal: Proposal) -> str:
    """Who has nothing to do for this workload."""
    uses = proposal.best.outlook.servers
    busy = [server for server, use in enumerate(uses) if use.sessions]
    spare = [server for server, use in enumerate(uses) if use.span is not None and not use.sessions]
    empty = [server for server, use in enumerate(uses) if use.span is None]
    parts = []
    if spare and busy:
        parts.append(f"{names_text(problem, spare)} only in reserve (replicas, more sessions)")
    if empty:
        parts.append(f"nothing on {names_text(problem, empty)}")
    if not parts:
        return ""
    sessions = problem.workload.sessions
    count = "1 session" if sessions == 1 else f"{sessions} sessions"
    verb = "does" if len(busy) == 1 else "do"
    return f"For {count} {names_text(problem, busy)} {verb} all the work; {', '.join(parts)}."


def _load(problem: Problem, proposal: Proposal) -> list[str]:
    """Where the workload does not fit."""
    outlook, said = proposal.best.outlook, []
    if outlook.unplaced:
        said.append(
            f"{outlook.unplaced} of {problem.workload.sessions} sessions find no room at once and "
            "have to wait."
        )
    rate = problem.workload.requests_per_s
    if rate >= outlook.requests_per_s_max:
        said.append(
            f"{rate:g} requests per second are too many: "
            f"{rate_text(outlook.requests_per_s_max)} can be served, beyond that queues grow."
        )
    return said


def _links(proposal: Proposal) -> list[str]:
    """For tokens per second: what ways between servers cost, and which rule won for that."""
    outlook = proposal.best.outlook
    free = outlook.rows_unlinked_per_s
    if free is None or proposal.objective not in ("throughput", "pareto"):
        return []
    said = []
    if outlook.rows_per_s * (1 + ALIKE) < free:
        said.append(
            f"Ways between servers limit: {rate_text(outlook.rows_per_s)} tokens/s get "
            f"through, {rate_text(free)} would if they had no limit."
        )
    blind = [one for one in proposal.tried if one.policy.startswith(BLIND)]
    best = max((one.outlook.rows_per_s for one in blind), default=outlook.rows_per_s)
    if best * (1 + ALIKE) < outlook.rows_per_s:
        said.append(
            f"The rule for tokens per second ({BLIND}) does not know what ways between servers let "
            f"through: {rate_text(best)} tokens/s by its placement, "
            f"{rate_text(outlook.rows_per_s)} by this one ({proposal.best.policy})."
        )
    return said


def _move(problem: Problem, proposal: Proposal) -> str:
    """Whether to leave the present placement."""
    change = proposal.change
    if change is None:
        return ""
    if proposal.best.policy == PRESENT or not change.moves:
        return "Stay: no placement that was found is better than the present one by more than 3 %."
    moved = names_text(problem, [move.server for move in change.moves])
    text = f"Moving {moved} takes about {seconds_text(change.load_s)} of loading"
    if change.is_seamless:
        return f"{text}; in the order below no block is without a server meanwhile."
    return f"{text}; some blocks are without a server meanwhile, so sessions will pause."


def _in_danger(proposal: Proposal) -> list[str]:
    """Blocks that one crash would take away."""
    single = sum(count == 1 for count in proposal.best.outlook.replicas)
    if not single:
        return []
    blocks = len(proposal.best.outlook.replicas)
    what = "All blocks are" if single == blocks else f"{single} of {blocks} blocks are"
    return [f"{what} on one server only: if it goes, answers stop until another loads them."]
