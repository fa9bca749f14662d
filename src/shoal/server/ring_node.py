"""A node's side of the ring stream: measure, take blocks as told, say each second how it goes.

What a node really does (load, serve, announce) lies behind `NodeWork`.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from shoal.base.errors import ProtocolError, ShoalError, error_from_code
from shoal.base.limits import CALL_TIMEOUT_S, DETAIL_CHARS_MAX
from shoal.base.spans import Span
from shoal.net.channel import Channel
from shoal.net.tasks import first_failure
from shoal.wire.messages import Error
from shoal.wire.ring import JoinRing, Measured, RingModel, RingOver, RingReport, RingTask

logger = logging.getLogger(__name__)

REPORT_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFigures:
    """What a node's process takes and does now; as `RingReport` tells it."""

    memory_bytes: int
    memory_peak_bytes: int
    free_bytes: int
    busy_s: float = 0.0
    up_s: float = 0.0
    iterations: int = 0
    rows: int = 0
    pace_s: float = 0.0


class NodeWork(Protocol):
    """What a node can do."""

    @property
    def span(self) -> Span:
        """The blocks that are served; empty: none."""

    async def measure(self, model: RingModel) -> Measured:
        """Get ready for this model; what this machine can do for it.

        Raises:
            ShoalError: nothing, and why.
        """

    async def take(self, span: Span, *, is_beside: bool) -> None:
        """Serve these blocks, or none if the span is empty.

        Raises:
            ShoalError: they can't be had.
        """

    def figures(self) -> NodeFigures:
        """How it does."""


class RingMember:
    """One stream's worth of membership."""

    def __init__(self, channel: Channel, work: NodeWork, name: str) -> None:
        self._channel = channel
        self._work = work
        self._name = name
        self._task = 0
        self._is_loading = False
        self._failure = ""
        self._wanted: asyncio.Queue[RingTask] = asyncio.Queue()
        self._sending = asyncio.Lock()

    async def run(self, measured: Measured | None = None) -> str:
        """Follow the starter until it ends the ring; returns its reason.

        `measured`: what was found before, when a stream broke and this is another one.

        Raises:
            ShoalError: the stream broke, we were refused, or can't do anything.
        """
        span = self._work.span
        await self._send(JoinRing(self._name, span.start, span.end))
        model = await self._model()
        if measured is None:
            measured = await self._work.measure(model)
        await self._send(measured)
        over: list[str] = []
        await first_failure(self._follow(over), self._report_often(), self._work_off())
        return over[0]

    async def _model(self) -> RingModel:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            message, _ = await self._channel.receive()
        if isinstance(message, Error):
            raise error_from_code(message.code, message.detail, message.retry_after_s)
        if not isinstance(message, RingModel):
            raise ProtocolError(f"{type(message).__name__} in answer to JoinRing")
        return message

    async def _follow(self, over: list[str]) -> None:
        while True:
            message, _ = await self._channel.receive()
            match message:
                case RingTask():
                    self._wanted.put_nowait(message)
                case RingOver():
                    over.append(message.detail)
                    return
                case _:
                    raise ProtocolError(f"{type(message).__name__} from a ring's starter")

    async def _work_off(self) -> None:
        while True:
            task = await self._wanted.get()
            while not self._wanted.empty():
                task = self._wanted.get_nowait()  # only the last counts
            self._is_loading, self._failure = True, ""
            await self.report()
            try:
                await self._work.take(Span(task.start, task.end), is_beside=task.is_beside)
            except ShoalError as error:
                logger.warning("task failed blocks=[%d,%d) reason=%s", task.start, task.end, error)
                self._failure = error.detail or type(error).__name__
            self._is_loading, self._task = False, task.task
            await self.report()

    async def _report_often(self) -> None:
        while True:
            await self.report()
            await asyncio.sleep(REPORT_S)

    async def report(self) -> None:
        """Say how we do."""
        span, figures = self._work.span, self._work.figures()
        if self._failure:
            report = RingReport(self._task, "failed", detail=self._failure[:DETAIL_CHARS_MAX])
        elif self._is_loading:
            report = RingReport(self._task, "loading")
        else:
            report = RingReport(self._task, "online" if len(span) else "standby")
        await self._send(_filled(report, span, figures))

    async def _send(self, message: JoinRing | Measured | RingReport) -> None:
        async with self._sending:
            await self._channel.send(message)


def _filled(report: RingReport, span: Span, figures: NodeFigures) -> RingReport:
    return msgspec.structs.replace(
        report,
        start=span.start,
        end=span.end,
        memory_bytes=figures.memory_bytes,
        memory_peak_bytes=figures.memory_peak_bytes,
        free_bytes=figures.free_bytes,
        busy_s=figures.busy_s,
        up_s=figures.up_s,
        iterations=figures.iterations,
        rows=figures.rows,
        pace_s=figures.pace_s,
    )
