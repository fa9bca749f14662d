"""One thread that owns the device: all tensor work of a backend happens on it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import torch

from shoal.base.errors import InternalError

_T = TypeVar("_T")
_Job = Callable[[], None]


class _Errand(Generic[_T]):
    """Work that a task waits for to its end, however often the task is cancelled meanwhile.

    One callback on the event loop ends it: a chain of futures (`wrap_future`, `shield`) took
    0.1 ms more of each pass where the weights that were read before have emptied the caches.
    """

    def __init__(self, work: Callable[[], _T], loop: asyncio.AbstractEventLoop) -> None:
        self._work = work
        self._loop = loop
        self._waiter: asyncio.Future[None] = loop.create_future()
        self._is_over = False
        self._results: list[_T] = []
        self._error: BaseException | None = None

    def do(self) -> None:
        """On the device's thread."""
        try:
            self._results.append(self._work())
        except BaseException as error:  # noqa: BLE001  # handed to the waiting caller
            self._error = error
        with suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._end)

    async def outcome(self) -> _T:
        """What the work returned or raised; a cancellation goes on once it has ended."""
        cancelled: asyncio.CancelledError | None = None
        while not self._is_over:
            try:
                await self._waiter
            except asyncio.CancelledError as error:
                cancelled = error
                self._waiter = self._loop.create_future()
        failure, self._error = cancelled or self._error, None
        if failure is None:
            return self._results.pop()
        try:
            raise failure
        finally:
            del failure, cancelled  # whose tracebacks hold this frame

    def _end(self) -> None:
        self._is_over = True
        if not self._waiter.done():
            self._waiter.set_result(None)


class DeviceThread:
    """Runs jobs one after the other with a fixed number of compute threads.

    The number of threads is set here, not in the caller's thread: OpenMP keeps it per
    thread. Two threads on two busy cores were 5 to 20 times slower than one (measured).
    """

    def __init__(self, threads: int) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = threads
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="shoal-device", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the thread and block until it is done (for loading, not for serving)."""
        return self._submit(work).result()

    async def run(self, work: Callable[[], _T]) -> _T:
        """Run `work` on the thread; the event loop goes on meanwhile.

        A cancelled caller still waits for the work to end, so that nobody touches the same
        state meanwhile; then the cancellation goes on.
        """
        errand = _Errand(work, asyncio.get_running_loop())
        self._put(errand.do)
        return await errand.outcome()

    def stop(self) -> None:
        """Let the thread end after the jobs it has; returns at once."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)

    async def aclose(self) -> None:
        """Finish the job at hand and stop the thread."""
        self.stop()
        await asyncio.to_thread(self._thread.join)

    def _submit(self, work: Callable[[], _T]) -> concurrent.futures.Future[_T]:
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def job() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # handed to the waiting caller
                future.set_exception(error)

        self._put(job)
        return future

    def _put(self, job: _Job) -> None:
        if self._closed:
            raise InternalError("the device thread is closed")
        self._jobs.put(job)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                job()
                # The job keeps the last call's tensors alive while we wait for the next.
                del job
