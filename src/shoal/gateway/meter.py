"""What is counted, for Prometheus. One registry per gateway: no global state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from shoal.client.session import Recovery

FIRST_TOKEN_S: Final = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
TOKEN_S: Final = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1, 5)
ROWS: Final = (1, 2, 4, 8, 16, 32)


class Meter:
    """Counters of one gateway."""

    def __init__(self, on_repair: Callable[[Recovery], None]) -> None:
        self._on_repair = on_repair
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "shoal_gateway_requests", "Answers to requests.", ["path", "status"], registry=registry
        )
        self.first_token_s = Histogram(
            "shoal_gateway_first_token_seconds", "From the request to its first token.",
            buckets=FIRST_TOKEN_S, registry=registry,
        )  # fmt: skip
        self.token_s = Histogram(
            "shoal_gateway_token_seconds", "Between two tokens of an answer.",
            buckets=TOKEN_S, registry=registry,
        )  # fmt: skip
        self.waiting_s = Histogram(
            "shoal_gateway_waiting_seconds", "In the line, before a place was free.",
            buckets=FIRST_TOKEN_S, registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "shoal_gateway_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.kept_tokens = Counter(
            "shoal_gateway_kept_tokens", "Tokens of prompts that the servers had already.",
            registry=registry,
        )  # fmt: skip
        self.answer_tokens = Counter(
            "shoal_gateway_answer_tokens", "Tokens of answers.", registry=registry
        )
        self.repairs = Counter(
            "shoal_gateway_repairs", "Chains that were repaired under an answer.",
            registry=registry,
        )  # fmt: skip
        self.repair_s = Histogram(
            "shoal_gateway_repair_seconds", "How long a repair held an answer up.",
            buckets=FIRST_TOKEN_S, registry=registry,
        )  # fmt: skip

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def repaired(self, recovery: Recovery) -> None:
        """A chain was repaired."""
        self.repairs.inc()
        self.repair_s.observe(recovery.pause_s)
        self._on_repair(recovery)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
