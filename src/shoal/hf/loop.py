"""An event loop on a thread of its own, for code that is not async.

The client's streams must be served while a person thinks about the next line, in a script
as in a notebook: so the loop runs all the time, and calls from other threads wait for it.
Any number of threads and other event loops may use one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar

from shoal.base.errors import InternalError, SessionClosed

T = TypeVar("T")

CANCEL_S: Final = 5.0
"""How long an interrupted call may clean up; it takes milliseconds unless the loop is stuck."""


class _Call(Generic[T]):
    """One piece of work on the loop; all but `ended` is touched there only."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.ended = threading.Event()
        self._work = work
        self._task: asyncio.Task[Any] | None = None

    async def run(self) -> T:
        self._task = asyncio.current_task()
        try:
            return await self._work
        finally:
            self.ended.set()

    def cancel(self) -> None:
        """End it; what comes later than this was never handed over."""
        if self._task is not None:
            self._task.cancel()
            return
        self._work.close()
        self.ended.set()


class Errands:
    """What work on the loop has done meanwhile by the thread that waits for it.

    That thread has what torch keeps per thread: the number of threads that compute, and memory.
    """

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_over = False

    async def do(self, act: Callable[[], T]) -> T:
        """What `act` returns or raises there; one errand after the other."""
        loop, future = asyncio.get_running_loop(), asyncio.Future[T]()

        def tell(say: Callable[[], None]) -> None:
            with suppress(RuntimeError):  # the loop was closed: whoever asked is gone
                loop.call_soon_threadsafe(lambda: None if future.done() else say())

        def run() -> None:
            try:
                found = act()
            except Exception as error:  # noqa: BLE001 - raised where the work waits for it
                tell(partial(future.set_exception, error))
            else:
                tell(partial(future.set_result, found))

        self._asked.put(run)
        return await future

    def serve(self) -> None:
        """Do what is asked for, until `end`."""
        while (run := self._asked.get()) is not None:
            if not self._is_over:
                run()

    def end(self) -> None:
        """Nobody waits for errands any more. From any thread."""
        self._is_over = True
        self._asked.put(None)


class BackgroundLoop:
    """Runs coroutines for other threads. `close` ends it; so does the end of the process."""

    def __init__(self, name: str = "shoal") -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: a script that forgot to close must be able to end.
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the loop itself."""
        return threading.current_thread() is self._thread

    @property
    def is_running(self) -> bool:
        """Whether it can still be used."""
        return self._thread.is_alive()

    def run(self, work: Coroutine[Any, Any, T], errands: Errands | None = None) -> T:
        """What `work` returns or raises; Ctrl-C cancels it and is raised. Meanwhile this thread
        does what `work` asks of `errands`.

        Raises:
            SessionClosed: the loop was closed.
        """
        if self.is_own_thread:
            work.close()
            raise InternalError("a call that waits was made on the event loop itself")
        self._check_running(work)
        call = _Call(work)
        try:
            future = self.start(call.run())
            if errands is not None:
                future.add_done_callback(lambda _: errands.end())
                errands.serve()
            return future.result()
        except concurrent.futures.CancelledError:
            raise SessionClosed("the model was closed") from None
        except KeyboardInterrupt:  # at any moment: also before the call was handed over
            self.call_soon(call.cancel)
            # What it undoes must be undone before the caller goes on.
            call.ended.wait(CANCEL_S)
            raise

    async def run_from(self, work: Coroutine[Any, Any, T]) -> T:
        """The same from a coroutine on another event loop; cancelling cancels `work`.

        Raises:
            SessionClosed: the loop was closed.
        """
        return await asyncio.wrap_future(self.start(work))

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run `work` as a task; whoever waits for the future may be interrupted, it may not.

        Raises:
            SessionClosed: the loop was closed.
        """
        self._check_running(work)
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _check_running(self, work: Coroutine[Any, Any, Any]) -> None:
        if not self.is_running:
            work.close()
            raise SessionClosed("the model was closed")

    def call_soon(self, act: Callable[[], object]) -> None:
        """Have the loop call `act`; nobody waits. No-op after `close`."""
        try:
            self._loop.call_soon_threadsafe(act)
        except RuntimeError:
            return  # closed: whatever was to be told is gone with it

    def close(self) -> None:
        """Cancel what runs, stop the loop, end the thread. Idempotent."""
        self.call_soon(self._loop.stop)
        if not self.is_own_thread:
            self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
