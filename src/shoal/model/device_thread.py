"""One thread that owns the device: all tensor work of a backend happens on it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from shoal.base.errors import InternalError

_T = TypeVar("_T")
_Job = Callable[[], None]


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
        future = asyncio.wrap_future(self._submit(work))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                try:
                    await asyncio.wait([future])
                except asyncio.CancelledError:
                    continue
            if not future.cancelled():
                future.exception()
            raise

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
        if self._closed:
            raise InternalError("the device thread is closed")
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def job() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # handed to the waiting caller
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                job()
                # The job keeps the last call's tensors alive while we wait for the next.
                del job
