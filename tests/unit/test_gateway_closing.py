"""A gateway that stops: answers at work end, and their readers are told."""

import asyncio
import json

import httpx2
import pytest

from shoal.gateway import listening
from shoal.gateway.closing import Closing
from shoal.gateway.errors import ApiError
from shoal.gateway.front import Front, FrontConfig
from shoal.gateway.http import EventStream
from shoal.gateway.keys import Keys
from shoal.gateway.listening import Listening, serving
from shoal.gateway.meter import Meter
from shoal.lab.clock import run_virtual


class Work:
    """Something that takes as long as it is let."""

    def __init__(self):
        self.began, self.goes_on, self.is_cancelled = asyncio.Event(), asyncio.Event(), False

    async def run(self):
        self.began.set()
        try:
            await self.goes_on.wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        return "done"


def test_work_that_ends_in_time_is_not_touched():
    async def story():
        closing, work = Closing(), Work()
        asyncio.get_running_loop().call_later(5, work.goes_on.set)
        assert await closing.within(work.run()) == "done"
        closing.end()
        assert not work.is_cancelled

    run_virtual(story())


def test_work_ends_with_the_gateway_and_none_begins_after():
    async def story():
        closing, work = Closing(), Work()
        asyncio.get_running_loop().call_later(5, closing.end)
        for _ in range(2):
            with pytest.raises(ApiError, match="being stopped") as caught:
                await closing.within(work.run())
            assert (caught.value.status, caught.value.code) == (503, "stopping")
        assert work.is_cancelled

    run_virtual(story())


def test_who_leaves_takes_the_work_along():
    async def story():
        work = Work()
        task = asyncio.ensure_future(Closing().within(work.run()))
        await work.began.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert work.is_cancelled

    run_virtual(story())


@pytest.mark.parametrize("is_endless", [False, True])
def test_a_stop_waits_for_nobody(monkeypatch, is_endless):
    """Readers are told; what would go on for ever is cut off."""
    monkeypatch.setattr(listening, "FAREWELL_S", 0.0)
    monkeypatch.setattr(listening, "CUT_OFF_S", 0.1)

    async def story():
        closing, work = Closing(), Work()

        async def app(scope, receive, send):
            if is_endless:
                await work.run()
            stream = EventStream(send)
            await stream.open()
            await stream.event({"text": "a"})
            try:
                await closing.within(work.run())
            except ApiError as error:
                await stream.event(error.body())
                await stream.close()

        front = Front(
            app, FrontConfig(keys=Keys({}), guarded=frozenset(), hosts=None), Meter(print)
        )
        lines = []

        async def read(url):
            async with httpx2.AsyncClient() as web, web.stream("POST", f"{url}/x") as response:
                lines.extend([line async for line in response.aiter_lines() if line])

        async with asyncio.timeout(20):
            async with serving(front, Listening(host="127.0.0.1", port=0), closing) as url:
                reading = asyncio.ensure_future(read(url))
                await work.began.wait()
            (error,) = await asyncio.gather(reading, return_exceptions=True)
        if is_endless:
            assert work.is_cancelled
        else:
            assert error is None
            assert json.loads(lines[1].removeprefix("data: "))["error"]["code"] == "stopping"
            assert lines[2] == "data: [DONE]"

    asyncio.run(story())
