"""What a server counts, for Prometheus: read from its parts when somebody asks.

Needs the extra `gateway` (prometheus-client). Nothing here is about what is said in a session.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from shoal.base.ids import short
from shoal.net.metering import TrafficBook
from shoal.server.server import Server

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4


class Guests(Protocol):
    """Thin clients that are answered: see `shoal.client.head_service.HeadService`."""

    num_tokens: int

    @property
    def num_sessions(self) -> int:
        """Their sessions."""

    @property
    def num_answers(self) -> int:
        """Answers at work."""


class ServerMeter:
    """Reads one server."""

    def __init__(
        self,
        server: Server,
        traffic: TrafficBook,
        clock: Callable[[], float],
        guests: Guests | None = None,
    ) -> None:
        self._server = server
        self._traffic = traffic
        self._clock = clock
        self._guests = guests
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        yield from self._engine()
        yield from self._sessions()
        yield from self._links()
        if self._guests is not None:
            yield _counter("head_tokens", "Tokens given to thin clients.", self._guests.num_tokens)
            yield _gauge("head_sessions", "Sessions of thin clients.", self._guests.num_sessions)
            yield _gauge("head_answers", "Their answers at work.", self._guests.num_answers)

    def _engine(self) -> Iterator[Metric]:
        engine = self._server.engine
        now_s = self._clock()
        yield _counter("iterations", "Iterations of the engine.", engine.iteration)
        yield _counter("rows", "Rows run; over iterations: the batch size.", engine.rows)
        yield _counter(
            "busy_seconds", "In iterations; over iterations: how long one takes.",
            engine.busy_s(now_s),
        )  # fmt: skip
        yield _gauge("running_rows", "Rows of the iteration under way.", engine.running_tokens)
        yield _gauge("queued_rows", "Rows that wait.", engine.queued_tokens)
        yield _gauge(
            "decode_block_seconds", "A decode pass through one block, of late; 0: there were none.",
            engine.pace.decode_s_per_block(now_s),
        )  # fmt: skip

    def _sessions(self) -> Iterator[Metric]:
        server = self._server
        hops, ledger = list(server.sessions), server.sessions.ledger
        yield _counter("sessions_opened", "Sessions opened.", server.sessions.num_opened)
        yield _counter(
            "sessions_rebuilt", "Of these, after a repair: a replay fills their cache.",
            server.sessions.num_rebuilt,
        )  # fmt: skip
        yield _gauge("sessions", "Sessions.", len(hops))
        yield _gauge("sessions_parked", "Without cache.", sum(hop.is_parked for hop in hops))
        yield _gauge("sessions_replaying", "Rebuilt now.", sum(hop.is_rebuilding for hop in hops))
        yield _gauge("cache_pages", "Pages of KV cache.", ledger.total)
        yield _gauge("cache_pages_free", "Free ones.", ledger.free)
        yield _gauge("cache_page_tokens", "Positions of a page.", ledger.page_tokens)
        yield _gauge("log_bytes", "Logs of all sessions.", sum(hop.log.num_bytes for hop in hops))

    def _links(self) -> Iterator[Metric]:
        sent = CounterMetricFamily(
            "shoal_server_sent_bytes", "Frames sent to a peer.", labels=["peer"]
        )
        received = CounterMetricFamily(
            "shoal_server_received_bytes", "Frames received from a peer.", labels=["peer"]
        )
        counted = {short(peer): one for peer, one in self._traffic.by_peer().items()}
        for name, one in {**counted, "others": self._traffic.others}.items():
            sent.add_metric([name], one.sent_bytes)
            received.add_metric([name], one.received_bytes)
        yield sent
        yield received
        yield _gauge("links", "Outgoing links of sessions.", self._server.num_links)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"shoal_server_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"shoal_server_{name}", text, value=value)
