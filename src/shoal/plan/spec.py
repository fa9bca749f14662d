"""What a placement is planned for: model, servers, links and workload, as numbers.

All are frozen and in seconds, bytes and rows (positions of a session); blocks are counted
from 0. Servers and clients are indices here; names are for people. Not here: what a chain
costs (`shoal.plan.cost`) and where these numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.plan.memory import CacheShape, log_bytes

Flow = Literal["hub", "push"]
"""Who carries hidden states between servers: the client, or the servers themselves."""

Exits = Literal["end", "anywhere"]
"""Where a session may leave a span: only at its end, as Petals does and the papers assume,
or at any border, as Shoal's router does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model's sizes. `weight_bytes` and `caches` hold one entry per block."""

    hidden_size: int
    weight_bytes: tuple[int, ...]
    caches: tuple[CacheShape, ...]
    row_bytes: int
    """One position's hidden states on a link and in a log."""
    keeps_logs: bool = True
    """Whether hops keep logs in the servers' memory. The published models have none."""
    page_tokens: int = 1

    def __post_init__(self) -> None:
        if not self.weight_bytes or len(self.weight_bytes) != len(self.caches):
            raise ConfigError(
                f"a model needs sizes for each block: {len(self.weight_bytes)} of weights, "
                f"{len(self.caches)} of caches"
            )
        if min(self.weight_bytes) < 1 or min(self.row_bytes, self.page_tokens) < 1:
            raise ConfigError("weights, rows and pages must have at least 1 byte or token")

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return len(self.weight_bytes)


def uniform_model(
    num_blocks: int,
    weight_bytes: int,
    cache: CacheShape,
    *,
    hidden_size: int = 1,
    row_bytes: int = 1,
    keeps_logs: bool = False,
) -> ModelSpec:
    """A model of equal blocks, as all published formulas assume."""
    return ModelSpec(
        hidden_size=hidden_size,
        weight_bytes=(weight_bytes,) * num_blocks,
        caches=(cache,) * num_blocks,
        row_bytes=row_bytes,
        keeps_logs=keeps_logs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeTimes:
    """Measured times of one decode pass through one block, by batch size.

    `points` are (batch, seconds), batches rising.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        batches = [batch for batch, _ in self.points]
        if not batches or batches[0] < 1 or any(a >= b for a, b in pairwise(batches)):
            raise ConfigError(f"decode times need rising batches from 1 on, not {batches}")
        if not all(0 <= seconds < math.inf for _, seconds in self.points):
            raise ConfigError(f"decode times must be at least 0 s: {self.points}")

    def at(self, batch: float) -> float:
        """Seconds of a pass of `batch` rows: straight lines between what was measured.

        Below the first point: as that. Beyond the last: on along the last line, if it
        rises; with a single point the time does not depend on the batch, as published.
        """
        first, last = self.points[0], self.points[-1]
        if batch <= first[0] or len(self.points) == 1:
            return first[1]
        for (low, low_s), (high, high_s) in pairwise(self.points):
            if batch <= high:
                return low_s + (high_s - low_s) * (batch - low) / (high - low)
        low, low_s = self.points[-2]
        slope = max(0.0, (last[1] - low_s) / (last[0] - low))
        return last[1] + slope * (batch - last[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """One server's memory and speed."""

    name: str
    memory_bytes: int
    """For weights, caches and logs; what the process itself takes is already off."""
    decode: DecodeTimes
    prefill_s_per_block: float = 0.0
    """Prefill takes this per block, whatever the prompt's length,"""
    prefill_s_per_block_token: float = 0.0
    """and this per block and token of the prompt."""
    forward_rows_per_s: float | None = None
    """Rows through one block in long batches; None: as prefill or decode suggest."""
    network_rows_per_s: float = math.inf
    """Rows in and out over its network, as Petals measures it."""
    link_bytes_per_s: float = math.inf
    """Rate of its network, either way."""
    uplink_bytes_per_s: float = math.inf
    """Where it is less: of all that it sends,"""
    downlink_bytes_per_s: float = math.inf
    """and of all that it receives, whomever it goes to or comes from."""
    num_blocks_max: int | None = None
    """Never host more blocks than this."""

    def __post_init__(self) -> None:
        if self.memory_bytes < 0:
            raise ConfigError(f"{self.name}: memory must be at least 0 bytes")
        times = (self.prefill_s_per_block, self.prefill_s_per_block_token)
        if not all(0 <= time < math.inf for time in times):
            raise ConfigError(f"{self.name}: times must be at least 0 s")
        rates = (
            self.link_bytes_per_s, self.uplink_bytes_per_s, self.downlink_bytes_per_s,
            self.network_rows_per_s, self.forward_rows_per_s or 1.0,
        )  # fmt: skip
        if not all(rate > 0 for rate in rates):
            raise ConfigError(f"{self.name}: rates must be above 0")

    @property
    def sent_bytes_per_s(self) -> float:
        """The most that it sends to all others together."""
        return min(self.link_bytes_per_s, self.uplink_bytes_per_s)

    @property
    def received_bytes_per_s(self) -> float:
        """The most that it receives from all others together."""
        return min(self.link_bytes_per_s, self.downlink_bytes_per_s)

    @property
    def rows_per_s(self) -> float:
        """Rows per second through one block when many come at once."""
        if self.forward_rows_per_s is not None:
            return self.forward_rows_per_s
        if self.prefill_s_per_block_token > 0:
            return 1 / self.prefill_s_per_block_token
        batch, seconds = self.decode.points[-1]
        return batch / seconds if seconds else math.inf

    def prefill_s(self, tokens: int) -> float:
        """Seconds of a prompt of `tokens` through one block."""
        return self.prefill_s_per_block + self.prefill_s_per_block_token * tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Round trips and what handling costs. `client_rtt_s[client][server]`, raw."""

    client_rtt_s: tuple[tuple[float, ...], ...]
    server_rtt_s: tuple[tuple[float, ...], ...] | None = None
    """`[sender][receiver]`; needed for push."""
    server_bytes_per_s: tuple[tuple[float, ...], ...] | None = None
    """`[sender][receiver]`: what the way between two servers carries; for push only. None: only
    their own links limit (`ServerSpec.link_bytes_per_s`)."""
    flow: Flow = "hub"
    handling_s: float = 0.0
    """Added to each hop of a decode step."""
    prefill_handling_s: float = 0.0
    """Added to each hop of a prefill,"""
    prefill_s_per_token: float = 0.0
    """and this for each of its tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What clients ask for; all clients ask equally often."""

    tokens_in: int
    tokens_out: int
    requests_per_s: float = 0.0
    sessions: int = 1
    """Concurrent sessions that a placement is made for (R of the papers)."""

    def __post_init__(self) -> None:
        if min(self.tokens_in, self.tokens_out, self.sessions) < 1:
            raise ConfigError("a workload needs at least 1 token in, 1 out and 1 session")
        if not self.requests_per_s >= 0:
            raise ConfigError("requests per second must be at least 0")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything a placement depends on. Not slotted: it keeps sums over its blocks."""

    model: ModelSpec
    servers: tuple[ServerSpec, ...]
    links: Links
    workload: Workload
    exits: Exits = "end"

    def __post_init__(self) -> None:
        count = len(self.servers)
        rows = list(self.links.client_rtt_s)
        if not rows:
            raise ConfigError("a problem needs at least one client")
        if self.links.server_rtt_s is not None:
            rows += self.links.server_rtt_s
            if len(self.links.server_rtt_s) != count:
                raise ConfigError(f"{count} servers need as many rows of round trips")
        elif self.links.flow == "push":
            raise ConfigError("push needs the round trips between servers (server_rtt_s)")
        if any(len(row) != count or not all(rtt >= 0 for rtt in row) for row in rows):
            raise ConfigError(f"each row of round trips must hold {count} numbers from 0 s on")
        self._check_rates(count)

    def _check_rates(self, count: int) -> None:
        rates = self.links.server_bytes_per_s
        if rates is None:
            return
        if self.links.flow != "push":
            raise ConfigError("rates between servers (server_bytes_per_s) are for push")
        if len(rates) != count or any(len(row) != count for row in rates):
            raise ConfigError(f"{count} servers need as many rows of as many rates between them")
        if not all(rate > 0 for row in rates for rate in row):
            raise ConfigError("rates between servers must be above 0")

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole model."""
        return self.model.num_blocks

    @property
    def num_clients(self) -> int:
        """Clients, each with its own round trips."""
        return len(self.links.client_rtt_s)

    def network_rows_per_s(self, server: int) -> float:
        """Decode rows per second in and out of a server by its own link, as measured or given.

        What comes in goes out, so the slower way limits both.
        """
        spec = self.servers[server]
        bytes_per_s = min(spec.sent_bytes_per_s, spec.received_bytes_per_s)
        return min(spec.network_rows_per_s, bytes_per_s / self.model.row_bytes)

    @cached_property
    def way_classes(self) -> tuple[int, ...]:
        """By server: which class it is of; ways to and from all of a class carry the same."""
        rates = self.links.server_bytes_per_s
        if rates is None:
            return (0,) * len(self.servers)
        seen: dict[object, int] = {}
        ways = zip(rates, zip(*rates, strict=True), strict=True)
        return tuple(seen.setdefault(one, len(seen)) for one in ways)

    def shares(self, sessions: int) -> list[int]:
        """By client: how many of so many sessions are its own, one after the other."""
        clients = self.num_clients
        return [len(range(client, sessions, clients)) for client in range(clients)]

    @cached_property
    def _weights(self) -> list[int]:
        return list(accumulate(self.model.weight_bytes, initial=0))

    @cached_property
    def _caches(self) -> list[int]:
        tokens = self.workload.tokens_in + self.workload.tokens_out
        pages = self.model.page_tokens
        sizes = (cache.session_bytes(tokens, pages) for cache in self.model.caches)
        return list(accumulate(sizes, initial=0))

    @cached_property
    def log_bytes(self) -> int:
        """A session's log at each hop."""
        if not self.model.keeps_logs:
            return 0
        tokens = self.workload.tokens_in + self.workload.tokens_out
        return log_bytes(tokens, self.model.row_bytes)

    def weight_bytes(self, span: Span) -> int:
        """Weights of the blocks of `span`."""
        return self._weights[span.end] - self._weights[span.start]

    def session_bytes(self, span: Span) -> int:
        """Caches and log of one session at a hop that runs `span`, at its full length."""
        return self.run_bytes(span.start, span.end)

    def run_bytes(self, start: int, end: int) -> int:
        """The same for blocks [start, end): searches ask often, and spans take time to make."""
        return self._caches[end] - self._caches[start] + self.log_bytes

    def can_host(self, server: int, span: Span) -> bool:
        """Whether a server may host `span`: its weights fit, if perhaps no session does."""
        spec = self.servers[server]
        most = self.num_blocks if spec.num_blocks_max is None else spec.num_blocks_max
        return len(span) <= most and self.weight_bytes(span) <= spec.memory_bytes

    @cached_property
    def _worst(self) -> list[tuple[int, int]]:
        """By number of blocks: most weights, most cache of any span of so many."""
        blocks = self.num_blocks
        return [
            (
                _widest(self._weights, count),
                _widest(self._caches, count) + (self.log_bytes if count else 0),
            )
            for count in range(blocks + 1)
        ]

    @cached_property
    def lightest_blocks(self) -> list[int]:
        """Weights and one session's cache of each block, the smallest first."""
        blocks = (Span(block, block + 1) for block in range(self.num_blocks))
        sizes = (
            self.weight_bytes(block) + self.session_bytes(block) - self.log_bytes
            for block in blocks
        )
        return sorted(sizes)

    def worst_bytes(self, num_blocks: int) -> tuple[int, int]:
        """Weights, and one session's memory, of `num_blocks` blocks wherever they lie."""
        return self._worst[num_blocks]

    def blocks_max(self, server: int, sessions: int) -> int:
        """How many blocks a server can host, wherever, with room for `sessions` sessions.

        With equal blocks and no logs: `floor(M / (s_m + s_c R))`, at most all.
        """
        spec = self.servers[server]
        most = self.num_blocks
        if spec.num_blocks_max is not None:
            most = min(most, spec.num_blocks_max)
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            weights, session = self._worst[middle]
            if weights + sessions * session <= spec.memory_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def _widest(sums: Sequence[int], count: int) -> int:
    return max(sums[end] - sums[end - count] for end in range(count, len(sums)))
