"""What a chain costs: the one cost model of planners, simulator and live router.

The price of a chain is linear: something for each hop, something for each block. For the
*hub* (the client relays between servers, as Petals does and the papers assume) a hop
costs its client's round trip. With *push* (servers send to each other, as Shoal does) it
costs half a round trip from whoever comes before, and the last hop half of one back.

The live router prices with the same functions what a client knows of ways (`shoal.plan.ways`).

Sources: BPRR (arXiv 2512.21884), section II; our notes on it say what its authors use as
constants. The push form is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from typing import Final, Literal, NamedTuple

from shoal.base.spans import Span
from shoal.plan.spec import Problem

Batch = float | Sequence[float]
"""Rows per decode pass: at all servers, or by server."""

Currency = Literal["token", "request"]
"""What is priced: one decode step, or a whole request from prompt to last token."""

RTT_UNKNOWN_S: Final = 0.1
"""Assumed round trip to a server that was not measured: a continent away."""

DECODE_UNKNOWN_S: Final = 0.01
"""Assumed decode time per block of a server that measured none (its record says 0)."""

HOP_S: Final = 0.001
"""Handling of one frame at a hop, beside links and blocks; makes short chains win ties."""

VIA_CLIENT_S: Final = 0.002
"""A link by way of the client: two more frames to handle (its delay is in the round
trips already)."""


PEERS_NEAR: Final = 4
"""Servers that a pushed token most likely comes from: a chain is short and seeks its like."""


class Hop(NamedTuple):
    """A server (an index into a problem) that runs `span`."""

    server: int
    span: Span


Chain = tuple[Hop, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What hops and blocks cost one client, in seconds, by server."""

    arrive: tuple[float, ...]
    """From the client."""
    between: tuple[tuple[float, ...], ...] | None
    """`[sender][receiver]`; None: as from the client (hub)."""
    leave: tuple[float, ...]
    """Back to the client, for the last hop."""
    block: tuple[float, ...]


def hop_s(entry_s: float, block_s: float, num_blocks: int) -> float:
    """Seconds of one hop: getting there, and its blocks."""
    return entry_s + block_s * num_blocks


def hub_entry_s(rtt_s: float, handling_s: float = HOP_S, transfer_s: float = 0.0) -> float:
    """Seconds of getting to a server and back."""
    return rtt_s + handling_s + 2 * transfer_s


def push_entry_s(rtt_s: float, handling_s: float = HOP_S, transfer_s: float = 0.0) -> float:
    """Seconds of getting to a server, one way."""
    return rtt_s / 2 + handling_s + transfer_s


def prices(problem: Problem, client: int, currency: Currency, *, batch: Batch = 1) -> Prices:
    """The prices of `client`; decode passes are of `batch` rows.

    A request is one prefill and `tokens_out - 1` decode steps.
    """
    workload = problem.workload
    step = _step_prices(problem, client, batch)
    if currency == "token":
        return step
    return _sum(_prefill_prices(problem, client), step, workload.tokens_out - 1)


def mean_prices(problem: Problem, currency: Currency, *, batch: Batch = 1) -> Prices:
    """The mean over all clients: what a dispatcher for all of them reckons with."""
    total = prices(problem, 0, currency, batch=batch)
    for client in range(1, problem.num_clients):
        total = _sum(total, prices(problem, client, currency, batch=batch), 1)
    return _scaled(total, 1 / problem.num_clients)


def at_batch(problem: Problem, price: Prices, currency: Currency, batch: float) -> Prices:
    """The same ways, for decode passes of `batch` rows: only blocks cost something else then."""
    workload, servers = problem.workload, problem.servers
    blocks = [server.decode.at(batch) for server in servers]
    if currency == "request":
        steps = workload.tokens_out - 1
        prompts = (server.prefill_s(workload.tokens_in) for server in servers)
        blocks = [prompt + steps * block for prompt, block in zip(prompts, blocks, strict=True)]
    return replace(price, block=tuple(blocks))


def typical_entries(problem: Problem, currency: Currency, *, mean: bool = False) -> list[float]:
    """By server: what getting to it costs when it is not known yet from where.

    Hub: the largest over the clients (or the mean). Push: the mean over the `PEERS_NEAR`
    nearest servers and, for want of better, of one client where there is no other server.
    """
    each = [prices(problem, client, currency) for client in range(problem.num_clients)]
    if mean:
        each = [mean_prices(problem, currency)]
    between = each[0].between
    entries = []
    for server in range(len(problem.servers)):
        if between is None or len(problem.servers) == 1:
            entries.append(max(price.arrive[server] for price in each))
            continue
        others = sorted(row[server] for sender, row in enumerate(between) if sender != server)
        near = others[:PEERS_NEAR]
        entries.append(sum(near) / len(near))
    return entries


def chain_s(price: Prices, chain: Sequence[Hop]) -> float:
    """Seconds of a chain that is not empty."""
    total = price.arrive[chain[0].server] + price.leave[chain[-1].server]
    for before, after in pairwise(chain):
        total += entry_after(price, before.server, after.server)
    return total + sum(price.block[hop.server] * len(hop.span) for hop in chain)


def entry_after(price: Prices, before: int, server: int) -> float:
    """Seconds of getting to `server` from the hop on `before`."""
    return price.arrive[server] if price.between is None else price.between[before][server]


def service_s(problem: Problem, client: int, chain: Sequence[Hop], *, batch: Batch = 1) -> float:
    """Response time of a request that does not wait: prefill and all its steps, seconds.

    `T = sum_j (t^I_cj + k_j tau^I_j) + (l - 1) sum_j (t_cj + k_j tau_j)` (BPRR, section II).
    """
    return chain_s(prices(problem, client, "request", batch=batch), chain)


def _step_prices(problem: Problem, client: int, batch: Batch) -> Prices:
    links = problem.links
    batches = batch if isinstance(batch, Sequence) else [batch] * len(problem.servers)
    blocks = [server.decode.at(rows) for server, rows in zip(problem.servers, batches, strict=True)]
    return _priced(problem, client, 1, links.handling_s, blocks)


def _prefill_prices(problem: Problem, client: int) -> Prices:
    links, tokens = problem.links, problem.workload.tokens_in
    handling_s = links.prefill_handling_s + links.prefill_s_per_token * tokens
    blocks = [server.prefill_s(tokens) for server in problem.servers]
    return _priced(problem, client, tokens, handling_s, blocks)


def _priced(
    problem: Problem, client: int, rows: int, handling_s: float, blocks: list[float]
) -> Prices:
    """The prices of sending `rows` rows through."""
    links = problem.links
    rtts = links.client_rtt_s[client]
    size = rows * problem.model.row_bytes
    ins = [size / server.received_bytes_per_s for server in problem.servers]
    outs = [size / server.sent_bytes_per_s for server in problem.servers]
    if links.flow == "hub" or links.server_rtt_s is None:
        arrive = [
            hub_entry_s(rtt, handling_s, (in_s + out_s) / 2)
            for rtt, in_s, out_s in zip(rtts, ins, outs, strict=True)
        ]
        return Prices(
            arrive=tuple(arrive), between=None, leave=(0.0,) * len(arrive), block=tuple(blocks)
        )
    ways: Iterable[Sequence[float]] = links.server_bytes_per_s or repeat(
        [math.inf] * len(ins), len(ins)
    )
    return Prices(
        arrive=tuple(
            push_entry_s(rtt, handling_s, in_s) for rtt, in_s in zip(rtts, ins, strict=True)
        ),
        between=tuple(
            tuple(
                push_entry_s(rtt, handling_s, max(out_s, in_s, size / rate))
                for rtt, in_s, rate in zip(row, ins, own, strict=True)
            )
            for row, out_s, own in zip(links.server_rtt_s, outs, ways, strict=True)
        ),
        leave=tuple(rtt / 2 + out_s for rtt, out_s in zip(rtts, outs, strict=True)),
        block=tuple(blocks),
    )


def _sum(one: Prices, other: Prices, times: float) -> Prices:
    """`one + times * other`."""

    def add(left: Sequence[float], right: Sequence[float]) -> tuple[float, ...]:
        return tuple(a + times * b for a, b in zip(left, right, strict=True))

    between = None
    if one.between is not None and other.between is not None:
        between = tuple(add(a, b) for a, b in zip(one.between, other.between, strict=True))
    return Prices(
        arrive=add(one.arrive, other.arrive),
        between=between,
        leave=add(one.leave, other.leave),
        block=add(one.block, other.block),
    )


def _scaled(price: Prices, factor: float) -> Prices:
    zero = Prices(
        arrive=(0.0,) * len(price.arrive),
        between=price.between and tuple((0.0,) * len(row) for row in price.between),
        leave=(0.0,) * len(price.leave),
        block=(0.0,) * len(price.block),
    )
    return _sum(zero, price, factor)
