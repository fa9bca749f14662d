"""A node's side of the ring stream: measure, take blocks as told, say each second how it goes.

What a node really does (load, serve, announce) lies behind `NodeWork`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from shoal.base.errors import (
    PeerTimeout,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
    error_from_code,
)
from shoal.base.limits import CALL_TIMEOUT_S, DETAIL_CHARS_MAX
from shoal.base.spans import Span
from shoal.net.channel import Channel
from shoal.net.tasks import first_failure
from shoal.wire.messages import Error
from shoal.wire.ring import JoinRing, Measured, RingModel, RingOver, RingReport, RingTask

logger = logging.getLogger(__name__)

REPORT_S: Final = 1.0

REJOIN_S: Final = 15.0
"""How long a node that serves blocks looks for a starter that it lost."""


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

    async def see_off(self, within_s: float) -> None:
        """Have the owners of sessions move them to whoever has our blocks now."""

    def figures(self) -> NodeFigures:
        """How it does."""


DialStarter = Callable[[], Awaitable[Channel]]
"""A new ring stream to the starter."""


class RingMember:
    """One machine's membership, over as many streams as it takes."""

    def __init__(self, work: NodeWork, name: str, *, rejoin_s: float = REJOIN_S) -> None:
        self._work = work
        self._name = name
        self._rejoin_s = rejoin_s
        self._model: RingModel | None = None
        """What the first starter said: blocks that are served are of this model."""
        self._measuring: asyncio.Task[Measured] | None = None
        """Goes on when a link breaks: a machine gets ready for a ring only once."""
        self._measured: Measured | None = None
        self._stream = 0
        """Counts streams: a task of an older one is not this one's."""
        self._done = 0
        """The last task of this stream that was finished or failed."""
        self._loading: Span | None = None
        self._failure = ""
        self._wanted: asyncio.Queue[tuple[int, RingTask]] = asyncio.Queue()
        self._news = asyncio.Event()
        self._is_leaving = False
        self._relieved = asyncio.Event()
        """Set when others have our blocks."""

    async def leave(self, within_s: float) -> None:
        """Serve on until others have our blocks, then see our sessions off, while `run` runs.

        Returns when nobody needs us any more, or after so many seconds: who still does then
        repairs that as after a loss.
        """
        if not len(self._work.span):
            return
        self._is_leaving = True
        self._news.set()
        try:
            async with asyncio.timeout(within_s) as limit:
                await self._relieved.wait()
                deadline_s = limit.when() or 0.0
                await self._work.see_off(deadline_s - asyncio.get_running_loop().time())
        except TimeoutError:
            logger.warning("leaving before others have our blocks blocks=%s", self._work.span)

    async def run(self, dial: DialStarter) -> str:
        """Follow the starter until it ends the ring; returns its reason.

        Raises:
            PeerUnreachable: it is gone for good, or runs another model, or the same otherwise.
            ShoalError: it refused us, or we can't do anything.
        """
        worker = asyncio.create_task(self._work_off(), name="ring tasks")
        try:
            channel = await dial()
            while True:
                try:
                    model = await self._enter(channel)
                    if model != self._model:
                        break
                    return await self._stay(channel, model)
                except (PeerUnreachable, PeerTimeout) as error:
                    logger.warning("starter lost reason=%s", error)
                finally:
                    channel.close()
                channel = await self._dial_again(dial)
            raise PeerUnreachable("its starter has begun another ring")
        finally:
            works = [worker, self._measuring] if self._measuring else [worker]
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)

    async def _dial_again(self, dial: DialStarter) -> Channel:
        deadline_s = asyncio.get_running_loop().time() + self._rejoin_s
        while True:
            try:
                return await dial()
            except (PeerUnreachable, PeerTimeout):
                if asyncio.get_running_loop().time() >= deadline_s:
                    raise
                await asyncio.sleep(REPORT_S)

    async def _enter(self, channel: Channel) -> RingModel:
        self._stream += 1
        self._done = 0
        span = self._loading or self._work.span
        await channel.send(JoinRing(self._name, span.start, span.end))
        model = await _model(channel)
        self._model = self._model or model
        return model

    async def _stay(self, channel: Channel, model: RingModel) -> str:
        over: list[str] = []
        await first_failure(self._follow(channel, over), self._report(channel, model))
        return over[0]

    async def _follow(self, channel: Channel, over: list[str]) -> None:
        while True:
            message, _ = await channel.receive()
            match message:
                case RingTask() if self._is_leaving:
                    if message.start == message.end:
                        self._relieved.set()  # nothing else is for us any more
                case RingTask():
                    self._wanted.put_nowait((self._stream, message))
                case RingOver():
                    over.append(message.detail)
                    return
                case _:
                    raise ProtocolError(f"{type(message).__name__} from a ring's starter")

    async def _work_off(self) -> None:
        while True:
            stream, task = await self._wanted.get()
            while not self._wanted.empty():
                stream, task = self._wanted.get_nowait()  # only the last counts
            if stream != self._stream:  # the starter does not count on it: JoinRing said otherwise
                continue
            self._loading, self._failure = Span(task.start, task.end), ""
            self._news.set()
            try:
                await self._work.take(self._loading, is_beside=task.is_beside)
            except ShoalError as error:
                logger.warning("task failed blocks=%s reason=%s", self._loading, error)
                self._failure = error.detail or type(error).__name__
            except Exception as error:  # whatever it was, the starter must hear that it failed
                logger.exception("task failed blocks=%s", self._loading)
                self._failure = repr(error)
            self._loading = None
            if stream == self._stream:
                self._done = task.task
            self._news.set()

    async def _report(self, channel: Channel, model: RingModel) -> None:
        """Say each second how we do, and at once when that changes; what we can do, first."""
        is_told = False
        while True:
            if self._measured is None:
                await self._measure(channel, model)
            if self._measured is not None and not is_told:
                await channel.send(self._measured)
                is_told = True
            self._news.clear()
            await channel.send(self._said())
            try:
                async with asyncio.timeout(REPORT_S):
                    await self._news.wait()
            except TimeoutError:
                pass

    async def _measure(self, channel: Channel, model: RingModel) -> None:
        """Begin, or take what has come of it."""
        if self._measuring is None:
            self._measuring = asyncio.create_task(self._work.measure(model), name="measure")
            self._measuring.add_done_callback(lambda _: self._news.set())
        elif self._measuring.done():
            measuring, self._measuring = self._measuring, None
            self._measured = await self._result(channel, measuring)

    async def _result(self, channel: Channel, measuring: asyncio.Task[Measured]) -> Measured:
        """What was measured; that it failed is told to the starter as well."""
        try:
            return measuring.result()
        except ShoalError as error:
            detail = (error.detail or type(error).__name__)[:DETAIL_CHARS_MAX]
            await channel.send(RingReport(self._done, "failed", detail=detail))
            raise

    def _said(self) -> RingReport:
        span, figures = self._work.span, self._work.figures()
        if self._is_leaving:
            report = RingReport(self._done, "leaving")
        elif self._measured is None:
            report = RingReport(self._done, "measuring")
        elif self._failure:
            report = RingReport(self._done, "failed", detail=self._failure[:DETAIL_CHARS_MAX])
        elif self._loading is not None:
            report = RingReport(self._done, "loading")
        else:
            report = RingReport(self._done, "online" if len(span) else "spare")
        return _filled(report, span, figures)


async def _model(channel: Channel) -> RingModel:
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            message, _ = await channel.receive()
    except TimeoutError as error:
        raise PeerTimeout("the starter does not say what the ring runs") from error
    if isinstance(message, Error):
        raise error_from_code(message.code, message.detail, message.retry_after_s)
    if not isinstance(message, RingModel):
        raise ProtocolError(f"{type(message).__name__} in answer to JoinRing")
    return message


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
