"""What came of a scenario: every request, means and quantiles, what servers held.

The same for all fidelities and for what was measured, so that they can be compared; a result
says which it is, and tables never mix them in one column.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from shoal.plan.cost import Chain
from shoal.plan.placement import Placement
from shoal.plan.spec import Problem

Fidelity = Literal["a", "b", "c"]

FIDELITIES: Final[dict[Fidelity, str]] = {
    "a": "analytic: every request alone",
    "b": "slots: memory, queues, reloads",
    "c": "live: the real client and server on virtual time",
}

QUANTILES: Final = (0.1, 0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What came of one request. Times are the scenario's."""

    client: int
    at_s: float
    tokens_in: int
    tokens_out: int
    start_s: float = math.inf
    """When it had memory on its whole chain (fidelity C: when its session was open)."""
    first_s: float = math.inf
    """When its first token was there."""
    end_s: float = math.inf
    chain: Chain = ()
    """The last one that it had."""
    repairs: int = 0
    error: str = ""
    """Why it never ended."""

    @property
    def response_s(self) -> float:
        """From its arrival to its last token."""
        return self.end_s - self.at_s

    @property
    def wait_s(self) -> float:
        """Until it could begin."""
        return self.start_s - self.at_s

    @property
    def first_token_s(self) -> float:
        """From its arrival to its first token."""
        return self.first_s - self.at_s

    @property
    def step_s(self) -> float:
        """Mean seconds per token after the first; 0 when there was only one."""
        steps = self.tokens_out - 1
        return (self.end_s - self.first_s) / steps if steps else 0.0

    @property
    def has_ended(self) -> bool:
        """Whether it was answered whole."""
        return self.end_s < math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The swarm from this moment on."""

    at_s: float
    running: int
    waiting: int
    used: tuple[float, ...]
    """By server: the share of its memory for sessions that is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run: simulated, or measured on real processes."""

    fidelity: Fidelity | Literal["measured"]
    seed: int
    served: tuple[Served, ...]
    placement: Placement
    """At the end."""
    samples: tuple[Sample, ...] = ()
    history: tuple[tuple[float, Placement], ...] = ()
    """Who served what from when on (fidelities B and C)."""
    outage_s: float = 0.0
    """How long some block was hosted by nobody."""
    moves: int = 0
    reload_bytes: int = 0
    """Weights that joins and moves loaded."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """More figures, by name; fidelity A: bounds."""

    @property
    def ended(self) -> list[Served]:
        """The requests that were answered whole."""
        return [one for one in self.served if one.has_ended]

    def summary(self) -> dict[str, float]:
        """Means and quantiles over the requests that ended, and what it cost."""
        ended = self.ended
        figures: dict[str, float] = {
            "requests": len(self.served),
            "failed": len(self.served) - len(ended),
            "repairs": sum(one.repairs for one in self.served),
        }
        figures |= _spread("response_s", [one.response_s for one in ended])
        figures |= _spread("wait_s", [one.wait_s for one in ended], (0.95,))
        figures |= _spread("first_token_s", [one.first_token_s for one in ended], (0.95,))
        steps = [one.step_s for one in ended if one.tokens_out > 1]
        figures |= _spread("step_s", steps, (0.95,))
        figures["s_per_token"] = mean([one.response_s / one.tokens_out for one in ended])
        span_s = max((one.end_s for one in ended), default=0.0)
        tokens = sum(one.tokens_out for one in ended)
        figures["tokens_per_s"] = tokens / span_s if span_s else 0.0
        figures["outage_s"] = self.outage_s
        figures["moves"] = self.moves
        figures["reload_bytes"] = self.reload_bytes
        return figures | dict(self.facts)


def mean(values: Sequence[float]) -> float:
    """The mean; not a number where there are none."""
    return sum(values) / len(values) if values else math.nan


def quantile(values: Iterable[float], share: float) -> float:
    """The value that `share` of them don't exceed, between neighbours in proportion."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _spread(
    name: str, values: Sequence[float], shares: Sequence[float] = QUANTILES
) -> dict[str, float]:
    figures = {f"{name}_mean": mean(values)}
    return figures | {f"{name}_p{share * 100:g}": quantile(values, share) for share in shares}


def mean_summary(results: Sequence[Result]) -> dict[str, float]:
    """Each figure's mean over runs that differ in their seeds."""
    summaries = [result.summary() for result in results]
    return {name: mean([one[name] for one in summaries]) for name in summaries[0]}


REQUEST_COLUMNS: Final = (
    "seed", "client", "at_s", "tokens_in", "tokens_out", "wait_s", "first_token_s", "response_s",
    "step_s", "repairs", "chain", "error",
)  # fmt: skip


def write_requests(path: Path, results: Iterable[Result], names: Sequence[str]) -> None:
    """Every request of every run as CSV; `names` are the servers'."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(REQUEST_COLUMNS)
        for result in results:
            for one in result.served:
                figures = (one.wait_s, one.first_token_s, one.response_s, one.step_s)
                writer.writerow(
                    [result.seed, one.client, f"{one.at_s:.6f}", one.tokens_in, one.tokens_out]
                    + [f"{figure:.6f}" if one.has_ended else "" for figure in figures]
                    + [one.repairs, chain_text(one.chain, names), one.error]
                )


def chain_text(chain: Chain, names: Sequence[str]) -> str:
    """A chain for people: `a [0,4) b [4,8)`."""
    return " ".join(f"{names[hop.server]} {hop.span}" for hop in chain)


def names_of(problem: Problem) -> list[str]:
    """The servers' names, made unique where they are not."""
    names = [server.name for server in problem.servers]
    if len(set(names)) == len(names):
        return names
    return [f"{name}{number}" for number, name in enumerate(names)]


def write_summary(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON file; see `plain`."""
    path.write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """As JSON can say it: what is no finite number becomes null."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
