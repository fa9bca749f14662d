"""Patience with peers: each second of waiting costs, each byte that comes pays."""

from __future__ import annotations

import asyncio

import pytest

from shoal.base.errors import PeerTimeout
from shoal.lab.clock import run_virtual
from shoal.server.patience import Patience

LIMIT_S = 10.0
RATE = 100.0


def played(waits: list[tuple[float, int]]) -> int:
    """How many of these waits (seconds, then bytes) a peer gets."""

    async def story() -> int:
        patience = Patience(LIMIT_S, RATE)
        for done, (seconds, num_bytes) in enumerate(waits):
            try:
                await patience.wait(asyncio.sleep(seconds), "too slow")
            except PeerTimeout:
                return done
            patience.earn(num_bytes)
            await asyncio.sleep(100.0)  # our own work costs the peer nothing
        return len(waits)

    return run_virtual(story, timeout_s=1e6)


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ([(9.0, 900)] * 50, 50),  # just fast enough, for as long as it takes
        ([(3.0, 150)] * 50, 5),  # half as fast
        ([(9.0, 1)] * 50, 1),  # a byte a time
        ([(0.0, 10**9), (9.0, 0), (9.0, 0)], 2),  # a fast beginning buys no silence
        ([(11.0, 10**9)], 0),
    ],
)
def test_what_a_peer_may_take(waits: list[tuple[float, int]], expected: int) -> None:
    assert played(waits) == expected


def test_a_new_beginning() -> None:
    async def story() -> None:
        patience = Patience(LIMIT_S, RATE)
        await patience.wait(asyncio.sleep(9.0), "too slow")
        patience.renew()
        await patience.wait(asyncio.sleep(9.0), "too slow")
        with pytest.raises(PeerTimeout, match="too slow"):
            await patience.wait(asyncio.sleep(9.0), "too slow")

    run_virtual(story, timeout_s=1e6)
