"""Waiting for tasks."""

import asyncio

import pytest

from shoal.net.tasks import first_failure, wait_ended


def test_who_stops_waiting_for_a_task_does_not_stop_it() -> None:
    """A server that is told to stop still says that it lives while it drains."""

    async def story() -> None:
        stopped = asyncio.Event()

        async def keep() -> None:
            await stopped.wait()

        task = asyncio.create_task(keep())
        waiting = asyncio.create_task(first_failure(wait_ended(task)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not task.done()
        stopped.set()
        await task

    asyncio.run(story())


def test_what_it_ends_by_is_told() -> None:
    async def story() -> None:
        async def fail() -> None:
            raise ValueError("why")

        task = asyncio.create_task(fail())
        with pytest.raises(ValueError, match="why"):
            await first_failure(wait_ended(task))

    asyncio.run(story())
