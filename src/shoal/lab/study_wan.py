"""Three networks, and who carries hidden states: the client between servers, or they themselves.

Source: Borzunov et al. 2023 (arXiv 2312.08361), its table of single-batch inference on emulated
networks. Here the real client and servers run on virtual time (fidelity C). Blocks take what is
left of the published step on the fast network when Petals' own constant for a hop and the round
trips are taken off; so the fast network's figures are set, and those of the others are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from shoal.base.spans import Span
from shoal.lab.campaign import quiet
from shoal.lab.sim_live import simulate_live
from shoal.lab.sim_result import Served
from shoal.lab.sim_scenario import Request, Scenario
from shoal.lab.study import (
    Chart,
    Check,
    Figure,
    Report,
    Row,
    Task,
    between,
    falling,
    within,
)
from shoal.plan.memory import CacheShape, gqa, mha
from shoal.plan.placement import Placement
from shoal.plan.spec import (
    DecodeTimes,
    Flow,
    Links,
    Problem,
    ServerSpec,
    Workload,
    uniform_model,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What lies between any two machines, the client's included."""

    name: str
    bytes_per_s: float
    rtt_s: float


NETWORKS: Final = (
    Network(name="1 Gbit/s, 5 ms", bytes_per_s=125e6, rtt_s=0.005),
    Network(name="100 Mbit/s, 5 ms", bytes_per_s=12.5e6, rtt_s=0.005),
    Network(name="100 Mbit/s, 100 ms", bytes_per_s=12.5e6, rtt_s=0.1),
)
"""Published as `< 5 ms`, which is taken to be 5; the first is the one that blocks are set by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A model on equal servers, and its published steps per second by network."""

    name: str
    servers: int
    blocks: int
    hidden_size: int
    cache: CacheShape
    steps_per_s: dict[int, tuple[float, float, float]]
    """By length of the sequence, in the order of `NETWORKS`."""
    forward_tokens_per_s: float
    """Published for batches of 64 x 128 tokens on the fast network: how quick prompts are."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """Equal shares; the first ones take what is over."""
        borders = [-(-self.blocks * one // self.servers) for one in range(self.servers + 1)]
        return tuple(Span(*pair) for pair in pairwise(borders))

    @property
    def row_bytes(self) -> int:
        """One position's hidden states in 16 bits."""
        return 2 * self.hidden_size


SYSTEMS: Final = (
    System(
        name="BLOOM-176B, 3 servers", servers=3, blocks=70, hidden_size=14336, cache=mha(112, 128),
        steps_per_s={128: (1.71, 1.66, 1.23), 2048: (1.54, 1.49, 1.11)},
        forward_tokens_per_s=253.6,
    ),
    System(
        name="BLOOM-176B, 12 servers", servers=12, blocks=70, hidden_size=14336,
        cache=mha(112, 128),
        steps_per_s={128: (1.24, 1.24, 0.57), 2048: (1.06, 1.05, 0.53)},
        forward_tokens_per_s=180.0,
    ),
    System(
        name="Llama-2-70B, 3 servers", servers=3, blocks=80, hidden_size=8192, cache=gqa(8, 128),
        steps_per_s={128: (2.29, 2.29, 1.57), 2048: (2.02, 2.01, 1.44)},
        forward_tokens_per_s=155.1,
    ),
)  # fmt: skip

THEIR_HOP_S: Final = 0.018
"""What Petals' own cost model takes for one hop beside network and blocks."""

OUR_HOP_S: Final = 0.0003
"""One more server on a token's way, measured on real processes: benchmarks/hop.py, busy engine."""

TOKENS_IN, TOKENS_OUT = 8, 24
"""Of a run: modelled blocks are as quick at any length, so few steps tell."""

PROMPT_TOKENS: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Who carries hidden states, and what a hop costs beside network and blocks."""

    name: str
    flow: Flow
    hop_s: float


WAYS: Final = (
    Way(name="hub, 18 ms a hop", flow="hub", hop_s=THEIR_HOP_S),
    Way(name="push, 18 ms a hop", flow="push", hop_s=THEIR_HOP_S),
    Way(name="hub, 0.3 ms a hop", flow="hub", hop_s=OUR_HOP_S),
    Way(name="push, 0.3 ms a hop", flow="push", hop_s=OUR_HOP_S),
)
"""The first is Petals' way by its own constant, the last how Shoal works."""

BY_CLIENT, BY_SERVERS = WAYS[2], WAYS[3]


def block_s(system: System, tokens: int) -> float:
    """Seconds of a block: what a published step on the fast network leaves to it.

    A step by way of the client pays every server's round trip, transfers there and back, and
    Petals' hop. The client's own work is in it too: nothing says how much that is.
    """
    network = NETWORKS[0]
    hop_s = network.rtt_s + 2 * system.row_bytes / network.bytes_per_s + THEIR_HOP_S
    return (1 / system.steps_per_s[tokens][0] - system.servers * hop_s) / system.blocks


def problem_of(system: System, network: Network, way: Way, tokens: int) -> Problem:
    """The system's servers on a network, blocks as fast as they are with sequences of `tokens`."""
    count = system.servers
    server = ServerSpec(
        name="s",
        memory_bytes=10**13,
        decode=DecodeTimes(points=((1, block_s(system, tokens)),)),
        prefill_s_per_block_token=1 / (system.forward_tokens_per_s * system.blocks),
        link_bytes_per_s=network.bytes_per_s,
    )
    return Problem(
        model=uniform_model(
            system.blocks, 10**9, system.cache, hidden_size=system.hidden_size,
            row_bytes=system.row_bytes, keeps_logs=True,
        ),
        servers=tuple(replace(server, name=f"s{number}") for number in range(count)),
        links=Links(
            client_rtt_s=((network.rtt_s,) * count,),
            server_rtt_s=((network.rtt_s,) * count,) * count,
            flow=way.flow, handling_s=way.hop_s, prefill_handling_s=way.hop_s,
        ),
        workload=Workload(tokens_in=TOKENS_IN, tokens_out=TOKENS_OUT),
    )  # fmt: skip


def answered(
    system: System, network: Network, way: Way, tokens: int, tokens_in: int, tokens_out: int
) -> Served:
    """One answer of the real client and servers."""
    with quiet():
        return simulate_live(
            Scenario(
                problem=problem_of(system, network, way, tokens),
                requests=(Request(at_s=0.0, tokens_in=tokens_in, tokens_out=tokens_out),),
                placement=Placement(spans=system.spans),
            )
        ).served[0]


def wan(task: Task) -> Report:
    """Steps per second and seconds to a first token, by network and by who carries."""
    lengths = (128,) if task.is_quick else (128, 2048)
    rows = []
    for system in SYSTEMS[: 1 if task.is_quick else None]:
        for tokens in lengths:
            for index in task.told(f"{system.name}, {tokens} tokens", range(len(NETWORKS))):
                rows.append(_step_row(system, index, tokens))
    chart = Chart(
        table=STEPS,
        figures=("petals, steps/s", *(f"{way.name}, steps/s" for way in (WAYS[0], WAYS[3]))),
        label="steps per second",
    )
    prompts = range(0 if task.is_quick else len(NETWORKS))
    more = [_prompt_row(SYSTEMS[0], index) for index in task.told("prompts", prompts)]
    return Report(rows=(*rows, *more), checks=_checks(rows), charts=(chart,), notes=NOTES)


STEPS, PROMPTS = "steps per second", "a prompt of 2,048 tokens"


def _step_row(system: System, index: int, tokens: int) -> Row:
    network = NETWORKS[index]
    figures = [
        Figure(name="petals, steps/s", value=system.steps_per_s[tokens][index], origin="published")
    ]
    for way in WAYS:
        one = answered(system, network, way, tokens, TOKENS_IN, TOKENS_OUT)
        figures.append(Figure(name=f"{way.name}, steps/s", value=1 / one.step_s))
    keys = (("system", system.name), ("tokens", str(tokens)), ("network", network.name))
    return Row(table=STEPS, keys=keys, figures=tuple(figures))


def _prompt_row(system: System, index: int) -> Row:
    network = NETWORKS[index]
    figures = []
    for way in (BY_CLIENT, BY_SERVERS):
        one = answered(system, network, way, PROMPT_TOKENS, PROMPT_TOKENS, 1)
        figures.append(Figure(name=f"{way.name}, s to the first token", value=one.first_token_s))
    keys = (("system", system.name), ("network", network.name))
    return Row(table=PROMPTS, keys=keys, figures=tuple(figures))


BETWEEN: Final = 0.05
"""Published figures on the slow networks may lie so far outside what a model of them says."""


def _checks(rows: Sequence[Row]) -> tuple[Check, ...]:
    checks = []
    for row in rows:
        keys = dict(row.keys)
        name = f"{keys['system']}, {keys['tokens']} tokens, {keys['network']}"
        theirs = row.value("petals, steps/s", "published")
        hub, push, our_hub, ours = (row.value(f"{way.name}, steps/s") for way in WAYS)
        if keys["network"] == NETWORKS[0].name:
            checks.append(within(f"{name}: what blocks were set by", hub, theirs, 0.02))
            continue
        low, high = (1 - BETWEEN) * hub, (1 + BETWEEN) * push
        checks.append(between(f"{name}: between hub and push, 18 ms a hop", theirs, low, high))
        checks.append(falling(f"{name}: push > hub", (ours, our_hub)))
        checks.append(falling(f"{name}: push, 0.3 ms a hop > published", (ours, theirs)))
    return tuple(checks)


NOTES: Final = (
    "Set, not found: blocks take what the published step on the first network leaves when round "
    "trips of 5 ms (published: < 5), transfers by way of the client and Petals' own constant of 18 "
    "ms a hop are off. So `hub, 18 ms a hop` equals Petals there; only the other networks tell. "
    "The client's own work counts as blocks': a quicker client would make all of ours quicker.",
    "Found: with the constant of 18 ms, the published figures of the slow networks lie between "
    "those of a client that relays (2 ways per server) and of servers that push (1 way each and 1 "
    "back). Which of both Petals did in a measurement is not said.",
    "0.3 ms a hop is ours, measured on real processes (benchmarks/hop.py). It helps with near "
    "servers; far ones cost what light takes: with less else in a step, 100 ms weigh more in it, "
    "not less.",
    "Llama-2-70B and the 12 servers are known to us at second hand. Batches of forward passes, the "
    "other half of the published table, are not repeated; prompts run at their rate on the fast "
    "network (assumed), in chunks that the servers of a chain work on at the same time.",
)
