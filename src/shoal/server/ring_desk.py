"""The starter's desk: who has joined the ring, what each was told, how each does.

It keeps the streams and the books and decides nothing: that is `ring_keeper`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from shoal.base.errors import ConfigError, PeerBusy, PeerTimeout, ProtocolError
from shoal.base.ids import PeerId, short
from shoal.base.limits import CALL_TIMEOUT_S, HOPS_MAX
from shoal.base.spans import Span
from shoal.net.channel import Channel
from shoal.net.tasks import first_failure
from shoal.plan.spec import DecodeTimes
from shoal.wire.messages import Message
from shoal.wire.ring import (
    GetRing,
    JoinRing,
    Measured,
    RingModel,
    RingNode,
    RingOver,
    RingReport,
    RingState,
    RingTask,
)

logger = logging.getLogger(__name__)

SILENCE_S: Final = 6.0
"""A node reports each second; one that loads may hold its interpreter for a few."""

VISITORS_MAX: Final = 16
"""Streams of those who only ask: a run and a few views."""

VISIT_S: Final = 60.0
"""Who asks nothing for this long may ask again later."""

LOST_SHOWN: Final = 8
"""Nodes that have gone are shown as lost, the last so many."""


@dataclass(slots=True, kw_only=True, eq=False)
class DeskNode:
    """One machine that joined."""

    peer: PeerId
    name: str
    number: int
    """The order of joining, from 0."""
    is_starter: bool
    reported_s: float
    """When it said something last."""
    report: RingReport
    measured: Measured | None = None
    task: RingTask
    """What it was told last."""
    lost_s: float | None = None
    """When its stream ended; None: it is here."""
    outbox: asyncio.Queue[Message] = field(default_factory=asyncio.Queue)

    @property
    def span(self) -> Span | None:
        """The blocks it was told to until it is settled, then those it serves; None: none."""
        now = self.report if self.is_settled else self.task
        return Span(now.start, now.end) if now.end > now.start else None

    @property
    def is_settled(self) -> bool:
        """Whether it has done, or failed to do, what it was told last."""
        return self.report.task == self.task.task and self.report.state != "loading"

    @property
    def is_failed(self) -> bool:
        """Whether it could not do what it was told last."""
        return self.is_settled and self.report.state == "failed"

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to stop and is still here."""
        return self.report.state == "leaving" and self.lost_s is None

    @property
    def served(self) -> Span | None:
        """The blocks that it serves now."""
        if self.lost_s is not None or self.report.end <= self.report.start:
            return None
        return Span(self.report.start, self.report.end)


class RingDesk:
    """Takes ring streams: nodes that stay, visitors that ask."""

    def __init__(self, me: PeerId, model: RingModel) -> None:
        self.nodes: dict[PeerId, DeskNode] = {}
        self.turn = 0
        self.is_up = False
        self.proposal = ""
        self.planned_bytes: dict[PeerId, int] = {}
        """What each was planned to take."""
        self._me = me
        self._model = model
        self._visitors = 0
        self._changed = asyncio.Event()
        self._over: RingOver | None = None

    @property
    def here(self) -> list[DeskNode]:
        """Who has joined, has measured itself and is still here, in the order of joining."""
        return sorted(
            (one for one in self.nodes.values() if one.lost_s is None and one.measured is not None),
            key=lambda one: one.number,
        )

    async def changed(self, within_s: float) -> None:
        """Return when a node said something new, or after a while."""
        try:
            async with asyncio.timeout(within_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def tell(self, node: DeskNode, span: Span | None, *, is_beside: bool) -> None:
        """Send a node to other blocks; None: it becomes a spare."""
        start, end = (0, 0) if span is None else (span.start, span.end)
        node.task = RingTask(node.task.task + 1, start, end, is_beside)
        node.outbox.put_nowait(node.task)
        logger.info("node told node=%s blocks=%s beside=%s", node.name, span, is_beside)

    async def end(self, detail: str, within_s: float) -> None:
        """Tell all nodes that it is over; returns when they have gone, or after a while."""
        self._over = RingOver(detail)
        for node in self.nodes.values():
            node.outbox.put_nowait(self._over)
        try:
            async with asyncio.timeout(within_s):
                while any(one.lost_s is None and not one.is_starter for one in self.nodes.values()):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.info("nodes did not say good-bye")

    async def serve(self, channel: Channel) -> None:
        """Serve one stream until it ends.

        Raises:
            PeerError, ProtocolError: why it ended.
        """
        try:
            message = await _next(channel, CALL_TIMEOUT_S)
            if isinstance(message, JoinRing):
                await self._keep(channel, message)
            else:
                await self._answer(channel, message)
        except ProtocolError as error:
            await channel.refuse(error)
            raise
        finally:
            channel.close()

    # --- nodes -------------------------------------------------------------------------

    async def _keep(self, channel: Channel, message: JoinRing) -> None:
        before = self.nodes.get(channel.peer)
        if self._over is not None or (before is None and len(self.nodes) >= HOPS_MAX):
            await channel.refuse(PeerBusy("this ring takes no more nodes", retry_after_s=5.0))
            return
        if message.end < message.start:
            raise ProtocolError(f"blocks [{message.start},{message.end})")
        node = self._new_node(channel.peer, message, before)
        node.outbox.put_nowait(self._model)
        self.nodes[channel.peer] = node
        logger.info("node joined node=%s peer=%s", node.name, short(node.peer))
        try:
            await first_failure(self._read(channel, node), _write(channel, node))
        finally:
            node.lost_s = asyncio.get_running_loop().time()
            logger.info("node gone node=%s", node.name)
            self._forget_lost()
            self._changed.set()

    def _new_node(self, peer: PeerId, message: JoinRing, before: DeskNode | None) -> DeskNode:
        numbers = [one.number for one in self.nodes.values()]
        start, end = message.start, message.end
        return DeskNode(
            peer=peer,
            name=_free_name(message.name or short(peer), (
                one.name for one in self.nodes.values() if one.peer != peer
            )),
            number=before.number if before else max(numbers, default=-1) + 1,
            is_starter=peer == self._me,
            reported_s=asyncio.get_running_loop().time(),
            report=RingReport(0, "online" if end > start else "measuring", start, end),
            measured=before.measured if before else None,
            task=RingTask(0, start, end, False),
        )  # fmt: skip

    async def _read(self, channel: Channel, node: DeskNode) -> None:
        while True:
            message = await _next(channel, SILENCE_S)
            node.reported_s = asyncio.get_running_loop().time()
            match message:
                case Measured():
                    _check_times(message)
                    node.measured = message
                    self._changed.set()
                case RingReport():
                    is_news = (message.task, message.state) != (node.report.task, node.report.state)
                    node.report = message
                    if is_news:
                        self._changed.set()
                case _:
                    raise ProtocolError(f"{type(message).__name__} from a node of a ring")

    def _forget_lost(self) -> None:
        lost = sorted(
            (one for one in self.nodes.values() if one.lost_s is not None),
            key=lambda one: one.lost_s or 0.0,
        )
        for node in lost[:-LOST_SHOWN]:
            del self.nodes[node.peer]

    # --- visitors ----------------------------------------------------------------------

    async def _answer(self, channel: Channel, message: Message) -> None:
        if self._visitors >= VISITORS_MAX:
            await channel.refuse(PeerBusy("enough others ask already", retry_after_s=5.0))
            return
        self._visitors += 1
        try:
            while True:
                if not isinstance(message, GetRing):
                    raise ProtocolError(f"{type(message).__name__} on a ring stream")
                await channel.send(self.state(message.call))
                message = await _next(channel, VISIT_S)
        finally:
            self._visitors -= 1

    def state(self, call: int) -> RingState:
        """The books, for people."""
        now_s = asyncio.get_running_loop().time()
        nodes = sorted(
            self.nodes.values(), key=lambda one: (one.served or Span(1 << 16, 1 << 16), one.number)
        )
        shown = [self._shown(one, now_s) for one in nodes]
        return RingState(call, self.turn, self.is_up, shown[:HOPS_MAX], self.proposal)

    def _shown(self, node: DeskNode, now_s: float) -> RingNode:
        report, measured = node.report, node.measured
        return RingNode(
            peer=node.peer,
            name=node.name,
            state=report.state if node.lost_s is None else "lost",
            start=report.start,
            end=report.end,
            is_starter=node.is_starter,
            memory_bytes=report.memory_bytes,
            memory_peak_bytes=report.memory_peak_bytes,
            planned_bytes=self.planned_bytes.get(node.peer, 0),
            offered_bytes=0 if measured is None else measured.memory_bytes,
            busy_s=report.busy_s,
            up_s=report.up_s,
            iterations=report.iterations,
            rows=report.rows,
            pace_s=report.pace_s,
            age_s=max(0.0, now_s - node.reported_s),
            decode_s_by_batch=[] if measured is None else measured.decode_s_by_batch,
            detail=report.detail,
        )


async def _next(channel: Channel, within_s: float) -> Message:
    try:
        async with asyncio.timeout(within_s):
            return (await channel.receive())[0]
    except TimeoutError as error:
        raise PeerTimeout(f"{short(channel.peer)} says nothing any more") from error


def _check_times(measured: Measured) -> None:
    """See that a split can be made of them: later it would end the ring for everybody."""
    try:
        DecodeTimes(points=tuple(measured.decode_s_by_batch))
    except ConfigError as error:
        raise ProtocolError(f"Measured: {error.detail}") from error


async def _write(channel: Channel, node: DeskNode) -> None:
    while True:
        await channel.send(await node.outbox.get())


def _free_name(wanted: str, taken: Iterable[str]) -> str:
    """The name, with a number behind it if others have it: boards are often called alike."""
    names, number = set(taken), 2
    name = wanted
    while name in names:
        name, number = f"{wanted}-{number}", number + 1
    return name
