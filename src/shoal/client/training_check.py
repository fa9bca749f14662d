"""Spot checks of training: some of what servers computed is computed again, and compared.

A server that lies gives gradients that look like any others. Another server that has the same
blocks is asked for the same; where the two differ, a third one decides who of them is left.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shoal.base.errors import BadInput, PeerMisbehaved, ShoalError
from shoal.base.ids import PeerId, short
from shoal.client.training_host import HonestHost
from shoal.plan.lanes import choose_witness
from shoal.plan.routing import Wanted
from shoal.plan.view import Stage

logger = logging.getLogger(__name__)

Computed = tuple[bytes, bytes]
"""Rows, or gradients of rows, as they travel; and float32 gradients of tensors."""

DIFFERENCE_MAX: Final = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.05}
"""Of two servers of one numerics class: the norm of what differs, by that of the values.
Kernels add in other orders; a last bit that flips in one block is seen in all that follow."""

LOOSE_DIFFERENCE_MAX: Final = 0.3
"""Of servers of two classes: one may have its weights in 4 bits. Values that have nothing to do
with each other differ by 1.4."""


class Disputed(PeerMisbehaved):
    """Servers contradict each other, and nobody is there to decide."""

    def __init__(
        self,
        detail: str = "",
        *,
        peers: tuple[PeerId, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.peers = peers


class SpotChecks:
    """Has a share of what servers compute computed again."""

    def __init__(self, host: HonestHost, rate: float) -> None:
        self.passed = 0
        """Parts on which two servers agreed."""
        self.unchecked = 0
        """Parts that were due, but nobody else could compute them."""
        self.taken: Counter[PeerId] = Counter()
        """Parts that were taken unchecked, by server."""
        self.rate = rate
        self._host = host

    @property
    def caught(self) -> tuple[PeerId, ...]:
        """Servers that gave wrong values; they are not used any more."""
        return tuple(sorted(self._host.caught))

    async def check(
        self,
        encoding: str,
        stage: Stage,
        found: Computed,
        again: Callable[[Stage], Awaitable[Computed]],
    ) -> None:
        """Perhaps look at what the server of `stage` gave; `again` asks another one.

        Raises:
            PeerMisbehaved: two others agree on something else.
            Disputed: another one gives something else, and no third one agrees with either.
            BadInput: an encoding that can't be compared.
        """
        if not self.rate:
            return
        if self._host.rng.random() >= self.rate:
            self.taken[stage.peer] += 1
            return
        second = await self._by_another(encoding, stage, frozenset({stage.peer}), again)
        if second is None:
            self.unchecked += 1
            self.taken[stage.peer] += 1
            return
        if self._agree(encoding, (stage.peer, found), second):
            self.passed += 1
            return
        both = frozenset({stage.peer, second[0]})
        third = await self._by_another(encoding, stage, both, again)
        if third is not None and self._agree(encoding, (stage.peer, found), third):
            self._caught(second[0], stage)
            return
        if third is not None and self._agree(encoding, second, third):
            self._caught(stage.peer, stage)
            raise PeerMisbehaved(
                f"peer {short(stage.peer)} gives other values for blocks {stage.span} than two "
                "others"
            )
        raise Disputed(
            f"peers {short(stage.peer)} and {short(second[0])} give different values for blocks "
            f"{stage.span}, and no third server decides: go on without one of them, or with more",
            peers=(stage.peer, second[0]),
        )

    async def _by_another(
        self,
        encoding: str,
        stage: Stage,
        asked: frozenset[PeerId],
        again: Callable[[Stage], Awaitable[Computed]],
    ) -> tuple[PeerId, Computed] | None:
        """Who else computed it and what came of it; None: nobody."""
        host, wanted = self._host, Wanted(encoding=encoding)
        while True:
            experience = host.experience.snapshot(asyncio.get_running_loop().time())
            other = choose_witness(
                host.view(), stage, asked | experience.avoid, host.rng, wanted=wanted
            )
            if other is None:
                return None
            try:
                return other.peer, await again(other)
            except ShoalError as error:
                logger.info("no second computation peer=%s reason=%s", short(other.peer), error)
                asked |= {other.peer}

    def _agree(
        self, encoding: str, one: tuple[PeerId, Computed], other: tuple[PeerId, Computed]
    ) -> bool:
        classes = {
            server.numerics
            for server in self._host.view().servers
            if server.peer in (one[0], other[0])
        }
        most = LOOSE_DIFFERENCE_MAX if len(classes) > 1 else _tolerance(encoding)
        (rows, tensors), (other_rows, other_tensors) = one[1], other[1]
        return (
            difference(encoding, rows, other_rows) <= most
            and difference("float32", tensors, other_tensors) <= most
        )

    def _caught(self, peer: PeerId, stage: Stage) -> None:
        logger.warning("wrong values peer=%s blocks=%s: not used any more", short(peer), stage.span)
        self._host.caught.add(peer)


def difference(encoding: str, one: bytes, other: bytes) -> float:
    """The norm of what differs, by the larger norm of both; 0 for equal bytes.

    Raises:
        BadInput: an encoding that can't be compared.
    """
    if one == other:
        return 0.0
    mine, theirs = _values(encoding, one), _values(encoding, other)
    most = max(float(np.linalg.norm(mine)), float(np.linalg.norm(theirs)))
    return float(np.linalg.norm(mine - theirs)) / most if most else 0.0


def _tolerance(encoding: str) -> float:
    if encoding not in DIFFERENCE_MAX:
        known = ", ".join(DIFFERENCE_MAX)
        raise BadInput(f"rows in {encoding} can't be compared: spot checks need {known}")
    return DIFFERENCE_MAX[encoding]


def _values(encoding: str, data: bytes) -> NDArray[np.float64]:
    """(N,) values of raw rows."""
    _tolerance(encoding)
    if encoding == "bfloat16":
        halves = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return halves.view("<f4").astype(np.float64)
    kind = "<f4" if encoding == "float32" else "<f2"
    return np.frombuffer(data, dtype=kind).astype(np.float64)
