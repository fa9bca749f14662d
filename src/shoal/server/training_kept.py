"""What is kept of training passes, and what those under way may hold.

A kept pass saves its way back from running the blocks forward again. It is a favour: it is
bounded, dropped at will, and whoever comes back for one that is gone sends the rows again.
What passes under way may hold is set aside when they begin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import MessageTooLarge, PeerBusy
from shoal.base.ids import PeerId, short
from shoal.base.training import TrainedTensors, TrainingPass
from shoal.net.origin import Origin
from shoal.server.shares import ADDRESS_SHARE, left_for
from shoal.server.training_limits import BUSY_RETRY_S

logger = logging.getLogger(__name__)

KEPT_S: Final = 120.0
"""A pass that nobody came back for is dropped after this: steps of optimisers are shorter."""

KEPT_PER_CLIENT_MAX: Final = 256
"""Kept passes of one client, however small: a step has some dozens of micro-batches."""


@dataclass(slots=True, kw_only=True)
class _Kept:
    """A pass that went forward, or is on its way."""

    training_pass: TrainingPass
    since_s: float
    held_bytes: int
    tensors: TrainedTensors | None
    """Their values are not counted: the client may have no more of them than its quota."""


class KeptPasses:
    """What is kept of one server's forward passes, within a budget per client and in all."""

    def __init__(
        self,
        client_bytes_max: int,
        total_bytes_max: int,
        *,
        origin: Callable[[PeerId], Origin | None] = lambda client: None,
        address_share: float = ADDRESS_SHARE,
    ) -> None:
        """`origin` says where a client connects from."""
        self._client_bytes_max = client_bytes_max
        self._total_bytes_max = total_bytes_max
        self._origin = origin
        self._address_share = address_share
        self._kept: dict[tuple[PeerId, int], _Kept] = {}
        self._reserved: dict[int, tuple[PeerId, TrainingPass, int]] = {}
        """Passes under way: whose, and how many bytes each may hold."""

    def __len__(self) -> int:
        return len(self._kept)

    def held_bytes(self, client: PeerId | None = None) -> int:
        """Memory that is kept for a client, or for all."""
        return sum(
            kept.held_bytes for (one, _), kept in self._kept.items() if client in (None, one)
        )

    def reserve(self, client: PeerId, one: TrainingPass, num_bytes: int) -> None:
        """A pass is on its way and may hold so much; it counts until `release`."""
        self._reserved[id(one)] = client, one, num_bytes

    def release(self, one: TrainingPass) -> None:
        """A pass is kept now, or over."""
        self._reserved.pop(id(one), None)

    def room_to_run(
        self, client: PeerId, pass_bytes_max: int, least_bytes: int, now_s: float
    ) -> int:
        """What a way back that begins anew may hold; others make room for the least.

        Those of the same address first, when they hold what one address may.

        Raises:
            MessageTooLarge: `least_bytes` are more than all may hold.
            PeerBusy: others hold too much now.
        """
        self.expire(now_s)
        if least_bytes > self._total_bytes_max:
            raise MessageTooLarge(
                f"the rows that enter these blocks are {least_bytes} bytes, and this server holds "
                f"{self._total_bytes_max}: send fewer rows at once"
            )
        origin = self._origin(client)
        if origin is not None:
            self._make_room(lambda: self._left_at(origin), least_bytes, origin)
            if self._left_at(origin) < least_bytes and self._held_at(origin):
                raise PeerBusy(
                    "your address' memory for training is taken", retry_after_s=BUSY_RETRY_S
                )
        self._make_room(lambda: self._free_bytes, least_bytes, None)
        if self._free_bytes < least_bytes:
            raise PeerBusy("the memory for training is taken", retry_after_s=BUSY_RETRY_S)
        return max(least_bytes, min(self._left_at(origin), self._share(pass_bytes_max)))

    def _make_room(self, left: Callable[[], int], wanted_bytes: int, origin: Origin | None) -> None:
        """Have passes under way hold no more, and drop kept ones; `origin` None: anybody's."""
        if left() < wanted_bytes:
            for client, one, _ in list(self._reserved.values()):
                if origin in (None, self._origin(client)):
                    self.reserve(client, one, one.narrow())
        for client, number in list(self._kept):
            if left() >= wanted_bytes:
                return
            if origin in (None, self._origin(client)):
                self.drop(client, number)

    def _held_at(self, origin: Origin | None) -> list[tuple[Origin | None, int]]:
        """What is held or set aside for clients of an address, one by one."""
        kept = ((client, kept.held_bytes) for (client, _), kept in self._kept.items())
        under_way = ((client, count) for client, _, count in self._reserved.values())
        held = ((self._origin(client), count) for client, count in (*kept, *under_way) if count)
        return [one for one in held if one[0] == origin]

    def _left_at(self, origin: Origin | None) -> int:
        return left_for(
            origin,
            self._held_at(origin),
            total=self._total_bytes_max,
            share=self._address_share,
            per_client=self._client_bytes_max,
        )

    def room_to_keep(self, client: PeerId, pass_bytes_max: int, now_s: float) -> int:
        """What one more pass of a client may hold; 0: nothing more is kept of it."""
        self.expire(now_s)
        if sum(one == client for one, _ in self._kept) >= KEPT_PER_CLIENT_MAX:
            return 0
        mine = self._client_bytes_max - self.held_bytes(client)
        near = self._left_at(self._origin(client))
        return max(0, min(mine, near, self._share(pass_bytes_max)))

    @property
    def _free_bytes(self) -> int:
        reserved = sum(num_bytes for _, _, num_bytes in self._reserved.values())
        return self._total_bytes_max - self.held_bytes() - reserved

    def _share(self, pass_bytes_max: int) -> int:
        """A pass gets half of what is free at most: others come before it is through."""
        return max(0, min(pass_bytes_max, self._free_bytes // 2))

    def keep(
        self,
        client: PeerId,
        number: int,
        one: TrainingPass,
        tensors: TrainedTensors | None,
        now_s: float,
    ) -> None:
        """Keep a pass that went through, in place of one of that number."""
        self.drop(client, number)
        self._kept[(client, number)] = _Kept(
            training_pass=one, since_s=now_s, held_bytes=one.held_bytes, tensors=tensors
        )

    def drop_with(self, client: PeerId, tensors: TrainedTensors) -> None:
        """Free the passes of a client that have these tensors: it gave them up."""
        for (one, number), kept in list(self._kept.items()):
            if one == client and kept.tensors is tensors:
                self.drop(one, number)

    def has(self, client: PeerId, number: int) -> bool:
        """Whether the pass is kept."""
        return (client, number) in self._kept

    def take(self, client: PeerId, number: int) -> TrainingPass | None:
        """The pass, which is not kept any more; None: it is gone."""
        kept = self._kept.pop((client, number), None)
        return None if kept is None else kept.training_pass

    def drop(self, client: PeerId, number: int) -> None:
        """Free a pass; one that isn't kept is ignored."""
        kept = self.take(client, number)
        if kept is not None:
            kept.close()

    def forget(self, client: PeerId | None = None) -> None:
        """Free all passes of a client, or of all."""
        for one, number in list(self._kept):
            if client in (None, one):
                self.drop(one, number)

    def expire(self, now_s: float) -> None:
        """Free passes that nobody came back for."""
        for (client, number), kept in list(self._kept.items()):
            if kept.since_s + KEPT_S < now_s:
                logger.info("kept pass expired client=%s", short(client))
                self.drop(client, number)
