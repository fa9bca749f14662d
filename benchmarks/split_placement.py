"""How long is a block served nowhere when a swarm that places itself is split in two?

Eight servers of 6 of 12 blocks each place themselves until they rest; then two of them, by
chance, are cut off from the others for 5 minutes, and the network heals. Real servers, gossip
and decisions on virtual time (`shoal.lab.placing`); each looks every 60 s on average and loads
in 20 s. `hole at the cut`: the splits that left a side without some block at once, which nobody
can help; its blocks come back when a server there notices, waits for tickets (20 s) and loads.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from statistics import mean
from typing import Any

from report import environment, publish
from shoal.base.spans import Span, missing_blocks
from shoal.lab.clock import run_virtual
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.lab.placing import Coverage, PlacedServer, PlacedSpec, PlacedSwarm
from shoal.plan.live import LivePolicy
from shoal.server.rebalancing import RebalanceTimes

BLOCKS = 12
SETTLE_S, SPLIT_S, HEALED_S = 300.0, 300.0, 600.0


def has_hole(side: list[PlacedServer]) -> bool:
    """Whether some block is served nowhere on this side."""
    spans = [server.span for server in side if server.span is not None]
    return bool(missing_blocks(Span(0, BLOCKS), spans))


async def story(policy: LivePolicy, seed: int) -> dict[str, float]:
    """One swarm's split."""
    rng = random.Random(seed)
    network = SimulatedNetwork(rng, default=LinkConditions(delay_s=0.02, jitter_s=0.05))
    times = RebalanceTimes(period_s=60.0)
    async with PlacedSwarm(network, rng, BLOCKS, policy, times) as swarm:
        await swarm.grow(*[PlacedSpec(num_blocks=6, load_s=20.0)] * 8)
        await asyncio.sleep(SETTLE_S)
        before = swarm.moves
        mixed = rng.sample(swarm.servers, len(swarm.servers))
        sides = mixed[:2], mixed[2:]
        holes = sum(map(has_hole, sides))
        swarm.coverage = Coverage()
        swarm.split(*sides)
        await asyncio.sleep(SPLIT_S)
        apart = swarm.moves
        worst_s = max(coverage.uncovered_s for _, coverage in swarm.sides.values())
        network.heal()
        await asyncio.sleep(HEALED_S)
        return {
            "holes": holes, "side_s": worst_s, "whole_s": swarm.coverage.uncovered_s,
            "apart": apart - before, "after": swarm.moves - apart,
        }  # fmt: skip


def main() -> None:
    """Print the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-write", action="store_true")
    seeds = range(2 if parser.parse_args().quick else 20)
    rows: list[dict[str, Any]] = []
    policies: tuple[LivePolicy, ...] = ("petals", "latency")
    for policy in policies:
        found = [run_virtual(lambda p=policy, s=seed: story(p, s)) for seed in seeds]  # type: ignore[misc]
        hit = [one["side_s"] for one in found if one["holes"]]
        spared = [one["side_s"] for one in found if not one["holes"]]
        rows.append({
            "rule": policy, "splits": len(found), "hole at the cut": len(hit),
            "until it is filled, mean s": round(mean(hit), 1) if hit else 0.0,
            "longest s": max(hit, default=0.0),
            "uncovered in other splits s": max(spared, default=0.0),
            "uncovered in both sides at once s": max(one["whole_s"] for one in found),
            "moves while split": round(mean(one["apart"] for one in found), 2),
            "moves after": round(mean(one["after"] for one in found), 2),
        })  # fmt: skip
        print(rows[-1], flush=True)
    publish("split_placement", rows, environment(), source="simulated")


if __name__ == "__main__":
    main()
