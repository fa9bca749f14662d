"""Petals' published rules of placement: where a server joins, and when it moves.

Throughput first: every block should be served by as many rows per second as the next.
Latency is no concern of these rules; `shoal.plan.latency` has rules for that. Here also
is how Petals values a server's throughput, since the rules mean nothing without it.

Source: Borzunov et al., "Distributed inference and fine-tuning of large language models
over the internet" (2023), section 3.2 and appendix D, and the rules as the released
server applies them. Start with `choose_span`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import ConfigError
from shoal.base.spans import Span

BALANCE_QUALITY: Final = 0.75
"""Move only when the worst block now has less than this share of what it would have."""

EPSILON: Final = 1e-3
"""Relative margin: a server's own share is certainly gone when it is taken out, and a
swarm whose worst block has less than this many rows per second counts as broken."""

ROUNDS_MAX: Final = 100
"""Rounds of answering moves that a server imagines. The published rule has no limit and
nothing proves that it ends; three rounds are usual."""

THROUGHPUT_MAX: Final = 1e9
"""Rows per second that count as without limit: sums and differences need numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosting:
    """What one server hosts, and the rows per second that it passes through all of it."""

    span: Span
    throughput: float

    def __post_init__(self) -> None:
        if not 0 <= self.throughput < math.inf:
            raise ConfigError(f"throughput must be a number of rows/s, not {self.throughput}")


def server_throughput(
    forward_rows_per_s: float, num_blocks: int, network_rows_per_s: float = float("inf")
) -> float:
    """Rows per second of a server, as Petals announces it.

    `forward_rows_per_s` is through one block. A row that enters at a random block passes
    half of them on average, hence `(num_blocks + 1) / 2`.
    """
    if num_blocks < 1:
        raise ConfigError(f"a server hosts at least 1 block, not {num_blocks}")
    through_half = forward_rows_per_s / ((num_blocks + 1) / 2)
    return min(through_half, network_rows_per_s, THROUGHPUT_MAX)


def block_throughputs(hostings: Iterable[Hosting], num_blocks: int) -> list[float]:
    """Rows per second of each block of the model: the sum over the servers that host it.

    Raises:
        ConfigError: a span reaches beyond the model.
    """
    throughputs = [0.0] * num_blocks
    for hosting in hostings:
        if hosting.span.end > num_blocks:
            raise ConfigError(f"span {hosting.span} is not inside a model of {num_blocks} blocks")
        _add(throughputs, hosting.span, hosting.throughput)
    return throughputs


def choose_span(throughputs: Sequence[float], num_blocks: int) -> Span:
    """Where a server that can host `num_blocks` blocks should join.

    `throughputs` holds the rows per second of each block of the model without this
    server, 0 for a block that nobody hosts. The window is taken whose sorted
    throughputs are lexicographically least: the one with the worst block, then with the
    worst second worst, and so on; of equals the first.

    Raises:
        ConfigError: no block, or more blocks than the model has.
    """
    if not 1 <= num_blocks <= len(throughputs):
        raise ConfigError(
            f"a server can host 1 to {len(throughputs)} blocks of this model, not {num_blocks}"
        )
    starts = range(len(throughputs) - num_blocks + 1)
    start = min(starts, key=lambda start: sorted(throughputs[start : start + num_blocks]))
    return Span(start, start + num_blocks)


def choose_move(
    hostings: Sequence[Hosting],
    mine: int,
    num_blocks: int,
    rng: random.Random,
    *,
    quality: float = BALANCE_QUALITY,
) -> Span | None:
    """Where the server at index `mine` should move to, or None: stay.

    It imagines that it moves to the best place, and that then all servers, in random
    order and again and again, move to their best places until nobody wants to. It moves
    if the worst block had less than `quality` of what it has then. It never leaves when
    that would uncover a block. More than 1 for `quality` means: always move.

    Raises:
        ConfigError: a span reaches beyond the model.
    """
    throughputs = block_throughputs(hostings, num_blocks)
    spans = [hosting.span for hosting in hostings]
    before = min(throughputs)
    own = hostings[mine]
    without = list(throughputs)
    _add(without, own.span, -own.throughput * (1 + EPSILON))
    if before > EPSILON and min(without) <= 0:
        return None
    target = choose_span(without, len(own.span))
    if quality > 1:
        return target
    if target == own.span:
        return None
    _move(throughputs, spans, mine, target, own.throughput)
    _settle(throughputs, spans, hostings, rng)
    after = min(throughputs)
    if after < max(before, EPSILON) or before / after >= quality - EPSILON:
        return None
    return target


def settled(hostings: Sequence[Hosting], num_blocks: int, rng: random.Random) -> list[Span]:
    """Where all would be once everybody had moved to the best place, again and again.

    Raises:
        ConfigError: a span reaches beyond the model.
    """
    throughputs = block_throughputs(hostings, num_blocks)
    spans = [hosting.span for hosting in hostings]
    _settle(throughputs, spans, hostings, rng)
    return spans


def _settle(
    throughputs: list[float],
    spans: list[Span],
    hostings: Sequence[Hosting],
    rng: random.Random,
) -> None:
    """Let everybody move to the best place until nobody wants to (`ROUNDS_MAX` at most)."""
    order = list(range(len(spans)))
    for _ in range(ROUNDS_MAX):
        rng.shuffle(order)
        has_moved = False
        for index in order:
            share = hostings[index].throughput
            without = list(throughputs)
            _add(without, spans[index], -share * (1 + EPSILON))
            target = choose_span(without, len(spans[index]))
            if target != spans[index]:
                _move(throughputs, spans, index, target, share)
                has_moved = True
        if not has_moved:
            return


def _move(
    throughputs: list[float], spans: list[Span], index: int, target: Span, share: float
) -> None:
    _add(throughputs, spans[index], -share)
    _add(throughputs, target, share)
    spans[index] = target


def _add(throughputs: list[float], span: Span, share: float) -> None:
    for block in range(span.start, span.end):
        throughputs[block] += share
