"""Fetching weights from several peers at once, each tensor checked against its hash.

One task per peer takes what `plan.fetching` chooses for it until nothing is left. A peer that
sends wrong bytes is dropped for good and named; one that stalls, leaves or is busy is tried
again later. What was begun is kept, so that another peer, or the next start, goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

from shoal.base.errors import (
    ConfigError,
    ModelUnknown,
    PeerBusy,
    PeerMisbehaved,
    PeerRefused,
    ProtocolError,
    ShoalError,
    WeightsMissing,
)
from shoal.base.ids import PeerId, short
from shoal.client.weight_ledger import Item, Ledger, Transfer
from shoal.client.weight_sources import Dial, Place, open_stream
from shoal.client.weight_stream import WeightStream, Wish, wishes
from shoal.plan.fetching import choose_batch, choose_takeover
from shoal.wire.weights import Holdings, unpack_held

logger = logging.getLogger(__name__)

PEERS_MAX: Final = 8
"""Peers in use at once: their uplinks together fill any ordinary downlink."""

RETRY_S: Final = 1.0
"""A peer that failed is tried again after this; doubled with each failure in a row."""

FAILURES_MAX: Final = 5
"""Failures in a row after which a peer is given up: 31 s of trying."""

LOOK_S: Final = 5.0
"""New peers are looked for, and slow ones judged, this often."""

PATIENCE_S: Final = 60.0
"""The download is given up when nothing at all comes for this long."""

NAMED_MAX: Final = 5
"""Missing tensors that an error names; the rest is counted."""


class Draft(Protocol):
    """One item that is being written."""

    @property
    def held(self) -> int:
        """Bytes from the start that are here."""

    async def append(self, piece: memoryview) -> None:
        """Add the next bytes. Raises ConfigError if the disk is full."""

    async def restart(self) -> None:
        """Forget what is held."""

    async def finish(self) -> bool:
        """Keep it if it has its hash; else False."""

    async def close(self) -> None:
        """Let go of it; what is held stays for the next draft."""


class Store(Protocol):
    """Where fetched weights go."""

    async def begin(self, content: bytes, num_bytes: int) -> Draft:
        """Go on with an item, or begin it."""

    async def digest(self, content: bytes, start: int, end: int) -> bytes:
        """BLAKE2b-128 over a part of a finished item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReport:
    """How a download went."""

    num_items: int
    fetched_bytes: Mapping[PeerId, int]
    """By peer; what was here already is not in it."""
    dropped: Mapping[PeerId, str]
    """Peers that sent wrong bytes or nonsense, and what."""


@dataclass(slots=True)
class _Trouble:
    """What is known against a peer."""

    failures: int = 0
    retry_s: float = 0.0
    """Not before this time."""
    is_over: bool = False
    reason: str = ""


@dataclass(slots=True)
class _Turn:
    """Wakes everybody who waits for the books to change."""

    _event: asyncio.Event = field(default_factory=asyncio.Event)

    def over(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        event = self._event
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()


class WeightFetch:
    """One download of parts of one model. Use `run` once."""

    def __init__(
        self,
        model: str,
        items: Sequence[Item],
        dial: Dial,
        places: Callable[[], Sequence[Place]],
        store: Store,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """`places` is asked again and again: peers come and go. `progress` hears bytes done
        and bytes in all."""
        self._model = bytes.fromhex(model)
        self._items = tuple(items)
        self._ledger = Ledger(items)
        self._num_items = len(self._ledger.missing)
        self._dial, self._places = dial, places
        self._store, self._progress = store, progress
        self._tasks: dict[PeerId, asyncio.Task[None]] = {}
        self._troubles: dict[PeerId, _Trouble] = {}
        self._dropped: dict[PeerId, str] = {}
        self._turn = _Turn()
        self._came_s = 0.0
        """When bytes came last."""

    async def run(self) -> FetchReport:
        """Fetch everything.

        Raises:
            WeightsMissing: no peer that can be used has what is missing; names it.
            ConfigError: the disk is full or can't be written to.
        """
        self._came_s = _now_s()
        try:
            while self._ledger.missing:
                self._start_peers()
                if not self._tasks and not self._retry_times():
                    raise self._missing_error()
                if self._came_s + PATIENCE_S < _now_s():
                    raise self._missing_error()
                await self._wait()
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return FetchReport(
            num_items=self._num_items,
            fetched_bytes=Counter(self._ledger.fetched_bytes),
            dropped=dict(self._dropped),
        )

    # --- peers: who is used, and what becomes of those that fail ----------------------------

    def _start_peers(self) -> None:
        now_s = _now_s()
        for place in self._places():
            trouble = self._troubles.setdefault(place.peer, _Trouble())
            if len(self._tasks) >= PEERS_MAX:
                return
            if place.peer in self._tasks or trouble.is_over or trouble.retry_s > now_s:
                continue
            self._tasks[place.peer] = asyncio.get_running_loop().create_task(
                self._use(place), name=f"weights/{short(place.peer)}"
            )

    def _retry_times(self) -> list[float]:
        known = {place.peer for place in self._places()}
        return [
            trouble.retry_s
            for peer, trouble in self._troubles.items()
            if peer in known and not trouble.is_over and peer not in self._tasks
        ]

    async def _wait(self) -> None:
        """Until a peer's task ends, one may be tried again, or it is time to look around."""
        due_s = _now_s() + LOOK_S
        if len(self._tasks) < PEERS_MAX:
            due_s = min([due_s, *self._retry_times()])
        if not self._tasks:
            await asyncio.sleep(max(0.0, due_s - _now_s()))
            return
        await asyncio.wait(
            self._tasks.values(),
            timeout=max(0.0, due_s - _now_s()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        for peer, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[peer]
                self._ended(peer, task)

    def _ended(self, peer: PeerId, task: asyncio.Task[None]) -> None:
        trouble = self._troubles[peer]
        if task.cancelled():  # its work was given to a quicker one, or it was found out
            trouble.retry_s = _now_s() + LOOK_S
            return
        error = task.exception()
        if error is None:
            trouble.reason = "has nothing of what is missing"
            trouble.is_over = True
            return
        if not isinstance(error, ShoalError) or isinstance(error, ConfigError):
            raise error
        trouble.reason = str(error)
        if isinstance(error, PeerMisbehaved | ProtocolError):
            self._drop(peer, str(error))
        elif isinstance(error, PeerRefused | ModelUnknown):
            trouble.is_over = True
        else:
            if not isinstance(error, PeerBusy):
                trouble.failures += 1
            pause_s = error.retry_after_s or RETRY_S * 2 ** max(0, trouble.failures - 1)
            trouble.retry_s = _now_s() + pause_s
            trouble.is_over = trouble.failures >= FAILURES_MAX
        logger.info("peer left peer=%s over=%s reason=%s", short(peer), trouble.is_over, error)

    def _drop(self, peer: PeerId, reason: str) -> None:
        """Never again: it sent what nobody sends by accident."""
        logger.warning("peer dropped peer=%s reason=%s", short(peer), reason)
        self._dropped[peer] = reason
        trouble = self._troubles.setdefault(peer, _Trouble())
        trouble.is_over, trouble.reason = True, reason
        if (task := self._tasks.get(peer)) is not None:
            task.cancel()

    def _missing_error(self) -> WeightsMissing:
        labels = self._ledger.missing_labels()
        named = ", ".join(labels[:NAMED_MAX])
        if len(labels) > NAMED_MAX:
            named += f" and {len(labels) - NAMED_MAX} more"
        tried = "; ".join(
            f"{short(peer)}: {trouble.reason or 'sends nothing'}"
            for peer, trouble in self._troubles.items()
        )
        return WeightsMissing(
            f"{len(labels)} of {self._num_items} tensors and files can't be had from any peer: "
            f"{named} ({tried or 'nobody serves this model'}). What was fetched is kept: start "
            "again when peers with these blocks are there"
        )

    # --- one peer ------------------------------------------------------------------------------

    async def _use(self, place: Place) -> None:
        """Let one peer send what is chosen for it, until it has nothing more for us."""
        stream = await open_stream(self._dial, place)
        peer = place.peer
        try:
            self._ledger.holders[peer] = self._holdings_of(await stream.holdings(self._model))
            while self._ledger.may_need(peer):
                view = self._ledger.view(_now_s())
                batch = choose_batch(view, peer)
                if batch:
                    await self._fetch(stream, batch)
                    continue
                slow = choose_takeover(view, peer, self._ledger.speeds.get(peer, 0.0))
                if slow is not None and slow in self._tasks:
                    logger.info("takeover from=%s by=%s", short(slow), short(peer))
                    self._tasks[slow].cancel()
                await self._turn.wait(LOOK_S)
        finally:
            self._ledger.holders.pop(peer, None)
            stream.close()

    def _holdings_of(self, holdings: Holdings) -> frozenset[bytes]:
        indexes = unpack_held(holdings.held)
        files = {one.content for one in holdings.files}
        return frozenset(
            item.content
            for item in self._items
            if (item.content in files if item.index is None else item.index in indexes)
        )

    async def _fetch(self, stream: WeightStream, batch: tuple[bytes, ...]) -> None:
        transfer = Transfer(stream.peer, batch, _now_s())
        self._ledger.transfers[stream.peer] = transfer
        drafts: dict[bytes, Draft] = {}
        try:
            wanted = await self._begin(stream.peer, batch, drafts)
            async with aclosing(stream.pieces(wanted)) as pieces:
                async for wish, piece in pieces:
                    draft = drafts[wish.content]
                    await draft.append(piece)
                    self._ledger.add(wish.content, piece, transfer)
                    self._came_s = _now_s()
                    self._troubles[stream.peer].failures = 0
                    self._progress(self._ledger.done_bytes, self._ledger.total_bytes)
                    if draft.held == self._ledger.missing[wish.content].num_bytes:
                        await self._finish(wish.content, draft)
        finally:
            del self._ledger.transfers[stream.peer]
            self._ledger.speeds[stream.peer] = transfer.bytes_per_s(_now_s())
            for draft in drafts.values():
                await draft.close()
            self._turn.over()

    async def _begin(
        self, peer: PeerId, batch: tuple[bytes, ...], drafts: dict[bytes, Draft]
    ) -> list[Wish]:
        """Open the drafts; returns what is still wanted of them."""
        wanted: list[Wish] = []
        for content in batch:
            item = self._ledger.missing[content]
            draft = drafts[content] = await self._store.begin(content, item.num_bytes)
            if self._ledger.must_restart(content, peer):
                await draft.restart()
            self._ledger.begin(content, draft.held, peer)
            if draft.held == item.num_bytes:  # stopped just before it was checked, or empty
                await self._finish(content, draft)
                if content not in self._ledger.missing:
                    continue
                self._ledger.begin(content, draft.held, peer)
            wanted += wishes(content, draft.held, item.num_bytes)
        return wanted

    async def _finish(self, content: bytes, draft: Draft) -> None:
        """Check an item that is whole.

        Raises:
            PeerMisbehaved: it is wrong, and one peer sent all of it.
        """
        label = self._ledger.missing[content].label
        if await draft.finish():
            for share in self._ledger.finish(content):
                true_digest = await self._store.digest(content, share.start, share.end)
                if share.digest.digest() != true_digest and share.peer not in self._dropped:
                    self._drop(share.peer, f"sent wrong bytes for {label}")
            return
        await draft.restart()
        author = self._ledger.spoil(content)
        if author is not None:
            raise PeerMisbehaved(f"{short(author)} sent wrong bytes for {label}")
        logger.warning("wrong bytes, fetched again from one peer tensor=%s", label)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
