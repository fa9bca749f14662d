"""Whose training pass runs next, and when."""

from __future__ import annotations

import asyncio

from shoal.base.ids import PeerId
from shoal.lab.clock import run_virtual
from shoal.server.training_queue import FORGIVEN_S, TrainingQueue

A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)


class Work:
    """So many steps of so long."""

    def __init__(self, steps: int, step_s: float = 0.1, *, fails: bool = False) -> None:
        self.left = steps
        self.ran = 0
        self._step_s = step_s
        self._fails = fails

    @property
    def is_over(self) -> bool:
        return self.left <= 0

    async def step(self) -> None:
        await asyncio.sleep(self._step_s)
        self.ran += 1
        self.left -= 1
        if self._fails:
            raise RuntimeError("a bug")


def test_turns_are_taken_by_time_not_by_steps() -> None:
    async def story() -> None:
        queue = TrainingQueue()
        slow, quick = Work(100, 0.3), Work(100, 0.1)
        queue.add(A, slow)
        queue.add(B, quick)
        for _ in range(40):
            await queue.step()
        assert abs(slow.ran * 0.3 - quick.ran * 0.1) <= 0.3 + 1e-9
        late = Work(100, 0.1)
        queue.add(PeerId(b"c" * 32), late)  # has no claim on what others had before
        for _ in range(30):
            await queue.step()
        assert late.ran <= 14

    run_virtual(story)


def test_one_step_that_took_long_is_forgiven() -> None:
    async def story() -> None:
        queue = TrainingQueue()
        stopped, other = Work(1, 60.0), Work(1000, 0.1)
        after = Work(1000, 0.1)
        queue.add(A, stopped)
        queue.add(A, after)
        queue.add(B, other)
        await queue.step()
        for _ in range(int(FORGIVEN_S / 0.1) * 70):
            await queue.step()
        assert after.ran > 0

    run_virtual(story)


def test_when_a_step_is_due() -> None:
    async def story() -> None:
        queue = TrainingQueue(share_min=0.25)
        now = asyncio.get_running_loop().time
        assert not queue.is_due(now(), is_idle=True)
        queue.add(A, Work(3, 1.0))
        assert queue.is_due(now(), is_idle=False)  # the first at once
        await queue.step()
        assert queue.is_due(now(), is_idle=True)
        assert not queue.is_due(now(), is_idle=False)
        assert queue.is_due(now() + 3.0, is_idle=False)

    run_virtual(story)


def test_a_client_that_left_is_forgotten_and_bugs_end_a_job() -> None:
    async def story() -> None:
        queue = TrainingQueue()
        queue.add(A, Work(5, fails=True))
        queue.add(B, Work(5))
        while queue.is_waiting:
            await queue.step()
            queue.forget(B)
        assert queue.steps == 1

    run_virtual(story)
