"""An event loop behind code that is not async."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from shoal.base.errors import InternalError, SessionClosed
from shoal.hf.loop import BackgroundLoop, Errands


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    made = BackgroundLoop("test loop")
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "test loop"]


async def give(value: int) -> int:
    await asyncio.sleep(0)
    return value


async def fail() -> None:
    raise KeyError("as it was raised")


def test_results_and_errors_come_through(loop: BackgroundLoop) -> None:
    assert loop.run(give(7)) == 7
    with pytest.raises(KeyError, match="as it was raised"):
        loop.run(fail())
    assert asyncio.run(loop.run_from(give(8))) == 8


def test_many_threads_share_it(loop: BackgroundLoop) -> None:
    found: list[int] = []
    calls = [threading.Thread(target=lambda n=n: found.append(loop.run(give(n)))) for n in range(9)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert sorted(found) == list(range(9))


def test_an_interrupt_cancels_and_waits_for_the_cleanup(loop: BackgroundLoop) -> None:
    cleaned = []

    async def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    with pytest.raises(KeyboardInterrupt):
        loop.run(interrupted())
    assert cleaned
    assert loop.run(give(1)) == 1


def test_cancelling_a_coroutine_elsewhere_cancels_here(loop: BackgroundLoop) -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def give_up() -> None:
        work = asyncio.create_task(loop.run_from(wait()))
        await asyncio.sleep(0)
        await loop.run_from(give(0))
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(give_up())
    assert ended.wait(30)


def test_waiting_on_the_loop_itself_is_a_bug_not_a_deadlock(loop: BackgroundLoop) -> None:
    async def nested() -> int:
        return loop.run(give(1))

    with pytest.raises(InternalError, match="on the event loop itself"):
        loop.run(nested())


def test_after_close_calls_are_refused_and_waiting_ones_end() -> None:
    loop = BackgroundLoop("test loop")
    begun = threading.Event()
    errors: list[BaseException] = []

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            loop.run(wait())
        except SessionClosed as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(30)
    loop.close()
    thread.join()
    assert len(errors) == 1
    loop.close()
    loop.call_soon(lambda: None)
    with pytest.raises(SessionClosed, match="closed"):
        loop.run(give(1))


def test_the_waiting_thread_does_what_the_work_asks_for(loop: BackgroundLoop) -> None:
    errands = Errands()

    async def asks() -> list[tuple[int, bool]]:
        def act(number: int) -> tuple[int, bool]:
            return number, threading.current_thread() is threading.main_thread()

        return await asyncio.gather(*(errands.do(lambda n=n: act(n)) for n in range(5)))

    assert loop.run(asks(), errands) == [(number, True) for number in range(5)]


def test_an_errand_that_fails_fails_the_work_and_the_others_are_not_done(
    loop: BackgroundLoop,
) -> None:
    errands, done = Errands(), []

    async def asks() -> None:
        def act(number: int) -> None:
            done.append(number)
            if number:
                raise KeyError(number)

        await errands.do(lambda: act(0))
        await errands.do(lambda: act(1))
        done.append("went on")

    with pytest.raises(KeyError, match="1"):
        loop.run(asks(), errands)
    assert done == [0, 1]


def test_an_interrupt_amid_an_errand_cancels_the_work(loop: BackgroundLoop) -> None:
    errands, cancelled = Errands(), threading.Event()

    async def asks() -> None:
        try:
            await errands.do(lambda: os.kill(os.getpid(), signal.SIGINT))
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        loop.run(asks(), errands)
    assert cancelled.is_set()
    assert loop.run(give(1)) == 1
