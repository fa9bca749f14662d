"""The virtual loop: time jumps, runs repeat, and a stuck program says where it is stuck."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import Any

import pytest

from shoal.lab import clock
from shoal.lab.clock import Deadlock, Livelock, VirtualTimeout, run_virtual


def test_a_day_takes_no_time() -> None:
    async def day() -> float:
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    assert run_virtual(day) == pytest.approx(86_400)


def test_timers_fire_in_order_at_their_times() -> None:
    async def scenario() -> list[tuple[str, float]]:
        log: list[tuple[str, float]] = []

        async def ticker(name: str, period_s: float) -> None:
            for _ in range(3):
                await asyncio.sleep(period_s)
                log.append((name, asyncio.get_running_loop().time()))

        async with asyncio.TaskGroup() as group:
            group.create_task(ticker("slow", 2.0))
            group.create_task(ticker("fast", 0.75))
        return log

    assert run_virtual(scenario()) == [
        ("fast", 0.75),
        ("fast", 1.5),
        ("slow", 2.0),
        ("fast", 2.25),
        ("slow", 4.0),
        ("slow", 6.0),
    ]


async def _outer_wait(event: asyncio.Event) -> None:
    await _inner_wait(event)


async def _inner_wait(event: asyncio.Event) -> None:
    await event.wait()


def test_deadlock_lists_every_task_with_its_whole_stack() -> None:
    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_outer_wait(asyncio.Event()), name="stuck one")
            await asyncio.sleep(5)

    with pytest.raises(Deadlock) as caught:
        run_virtual(scenario)
    text = str(caught.value)
    assert "at 5 s" in text
    for expected in ("stuck one", "_outer_wait", "_inner_wait", "await event.wait()", "scenario"):
        assert expected in text


async def _sleep_for_ever() -> None:
    for _ in itertools.count():
        await asyncio.sleep(1)


async def _spin() -> None:
    for _ in itertools.count():
        await asyncio.sleep(0)


@pytest.mark.parametrize(("main", "error"), [(_sleep_for_ever, VirtualTimeout), (_spin, Livelock)])
def test_endless_programs_are_stopped(
    main: Any, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "TURNS_MAX", 1000)
    with pytest.raises(error, match=main.__name__):
        run_virtual(main, timeout_s=100)


def test_errors_pass_through() -> None:
    async def scenario() -> None:
        await asyncio.sleep(1)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run_virtual(scenario)


def test_threads_are_refused() -> None:
    async def scenario() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(RuntimeError, match="virtual time"):
        run_virtual(scenario)


def test_cancelling_a_group_is_repeatable() -> None:
    async def scenario() -> list[int]:
        order: list[int] = []

        async def waiter(number: int) -> None:
            try:
                await asyncio.sleep(100)
            finally:
                order.append(number)

        async def fail() -> None:
            await asyncio.sleep(1)
            raise ValueError

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(50):
                    group.create_task(waiter(number))
                group.create_task(fail())
        except* ValueError:
            pass
        return order

    first = run_virtual(scenario)
    assert sorted(first) == list(range(50))
    assert run_virtual(scenario) == first


def test_waiting_for_a_coroutine_argument() -> None:
    async def value() -> int:
        return 7

    coro: Coroutine[Any, Any, int] = value()
    assert run_virtual(coro) == 7
