"""Several ways to one thing, begun one after the other: the first that works counts.

As RFC 8305 ("happy eyeballs") does for addresses: the next way is begun when one before has
failed, or when it takes so long that something is likely wrong with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

from shoal.base.errors import ShoalError

T = TypeVar("T")

STAGGER_S: Final = 1.0
"""An address has so long for itself: a stream takes four round trips, of 0.25 s on a bad path."""


async def first_of(ways: Iterable[Callable[[], Awaitable[T]]], drop: Callable[[T], None]) -> T:
    """What the first way gives that works; `drop` gets what comes of others too late.

    Raises:
        ShoalError: none works; why the last to end did not.
        ValueError: there are no ways.
    """
    waiting = list(ways)[::-1]
    if not waiting:
        raise ValueError("no ways")
    if len(waiting) == 1:
        return await waiting[0]()
    begun: list[asyncio.Future[T]] = []
    first: list[T] = []
    running: set[asyncio.Future[T]] = set()
    error = ShoalError("not tried")
    try:
        while waiting or running:
            if waiting:
                begun.append(asyncio.ensure_future(waiting.pop()()))
                running.add(begun[-1])
            done, running = await asyncio.wait(
                running,
                timeout=STAGGER_S if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for one in done:
                try:
                    result = one.result()
                except ShoalError as failure:
                    error = failure
                else:
                    begun.remove(one)
                    first.append(result)
                    return result
        raise error
    finally:
        try:
            await _end(begun, drop)
        except asyncio.CancelledError:
            for result in first:  # nobody gets it any more
                drop(result)
            raise


async def _end(begun: Iterable[asyncio.Future[T]], drop: Callable[[T], None]) -> None:
    """Stop them all and wait for it; whatever comes of them is dropped, even if we are stopped."""

    def ended(one: asyncio.Future[T]) -> None:
        if not one.cancelled() and one.exception() is None:
            drop(one.result())

    for one in begun:
        one.add_done_callback(ended)
        one.cancel()
    await asyncio.gather(*begun, return_exceptions=True)
