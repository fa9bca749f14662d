"""Virtual time: an asyncio loop whose clock jumps instead of waiting.

Ordinary code (`asyncio.sleep`, `asyncio.timeout`, `TaskGroup`) runs on it unchanged: a
simulated day takes as long as its events take to compute. The order of everything is
fixed by the program and its seeds. Threads and real sockets don't belong here.
"""

from __future__ import annotations

import asyncio
import itertools
import selectors
import traceback
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, Final, TypeVar

T = TypeVar("T")

VIRTUAL_LIMIT_S: Final = 7 * 86_400.0
"""Virtual seconds that a run may take unless it says otherwise: a week."""

TURNS_MAX: Final = 1_000_000
"""Turns of the loop at one instant before it counts as spinning: some ten real seconds."""


class Deadlock(RuntimeError):
    """Every task waits and no timer is set: nothing can ever happen again."""


class Livelock(RuntimeError):
    """Tasks keep waking each other and time stands still."""


class VirtualTimeout(RuntimeError):
    """The run went on past its limit of virtual time."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time, from 0.

    Raises out of `run_until_complete`:
        Deadlock: every task waits and no timer is set.
        Livelock: TURNS_MAX turns at one instant.
        VirtualTimeout: the clock would pass `limit_s`.
    """

    def __init__(self, *, limit_s: float = VIRTUAL_LIMIT_S) -> None:
        self._now_s = 0.0
        self._limit_s = limit_s
        self._turns = 0
        self._numbers = itertools.count()
        super().__init__(_JumpingSelector(self._jump))
        self.set_task_factory(_numbered_task)

    def time(self) -> float:
        """The virtual time in seconds."""
        return self._now_s

    def run_in_executor(  # type: ignore[override]  # narrower on purpose: it only raises
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Threads don't run on virtual time.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"a thread can't run {func} on virtual time: hand in a fake, or use an ordinary loop"
        )

    def _jump(self, timeout_s: float | None) -> None:
        """Nothing is ready now: let the time of the next timer come."""
        if timeout_s == 0:
            self._turns += 1
            if self._turns > TURNS_MAX:
                raise Livelock(
                    f"{TURNS_MAX} turns of the loop at {self._now_s:g} s\n{task_report(self)}"
                )
            return
        self._turns = 0
        if timeout_s is None:
            raise Deadlock(
                f"at {self._now_s:g} s every task waits and no timer is set\n{task_report(self)}"
            )
        if self._now_s + timeout_s > self._limit_s:
            raise VirtualTimeout(
                f"not finished after {self._limit_s:g} virtual seconds\n{task_report(self)}"
            )
        self._now_s += timeout_s


class _JumpingSelector(selectors.DefaultSelector):
    """Looks at the sockets (the loop's own wake-up pipe) without ever waiting."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            self._jump(timeout)
        return ready


class _NumberedTask(asyncio.Task[Any]):
    """A task that hashes by its number.

    asyncio keeps tasks in sets (TaskGroup, wait); with hashes from memory addresses the
    order in which they are cancelled would differ from run to run.
    """

    def __init__(self, number: int, coro: Any, **options: Any) -> None:
        self._number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


def _numbered_task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
    if not isinstance(loop, VirtualLoop):
        raise TypeError("numbered tasks belong to a VirtualLoop")
    number = next(loop._numbers)
    options.setdefault("name", f"task-{number}")
    return _NumberedTask(number, coro, loop=loop, **options)


def run_virtual(
    main: Callable[[], Coroutine[Any, Any, T]] | Coroutine[Any, Any, T],
    *,
    timeout_s: float = VIRTUAL_LIMIT_S,
) -> T:
    """What `main` returns, run to its end on a fresh virtual loop.

    `timeout_s` is in virtual seconds.

    Raises:
        Deadlock, Livelock, VirtualTimeout: see VirtualLoop; the message lists all tasks
            with their stacks.
    """
    coro = main if isinstance(main, Coroutine) else main()
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit_s=timeout_s)) as runner:
        return runner.run(coro)


def task_report(loop: asyncio.AbstractEventLoop) -> str:
    """Every unfinished task of the loop with the lines where it waits, for people."""
    tasks = sorted(asyncio.all_tasks(loop), key=hash)
    return "\n".join(f"{task.get_name()}:\n{_stack(task)}" for task in tasks)


def _stack(task: asyncio.Task[Any]) -> str:
    """The whole chain of awaits; `Task.get_stack` shows only the outermost."""
    lines: list[str] = []
    waiting: Any = task.get_coro()
    while waiting is not None:
        frame, following = _frame_of(waiting)
        if frame is None:
            lines.append(f"  {waiting!r}\n")
        else:
            lines += traceback.format_list(traceback.extract_stack(frame, limit=1))
        waiting = following
    return "".join(lines)


def _frame_of(awaitable: Any) -> tuple[Any, Any]:
    """The frame of a coroutine, generator or async generator, and what it awaits."""
    for frame, following in (
        ("cr_frame", "cr_await"),
        ("gi_frame", "gi_yieldfrom"),
        ("ag_frame", "ag_await"),
    ):
        if hasattr(awaitable, frame):
            return getattr(awaitable, frame), getattr(awaitable, following)
    return None, None
