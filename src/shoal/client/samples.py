"""Many samples round one chain: admitted as there is room, decoded in slots, freed when over.

The sessions, their repair and the servers are those of any client. What is a sample's own (how
its prompt becomes rows, which token follows a row) is behind `Sample`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.base.errors import ConfigError, NoRouteError, ShoalError
from shoal.client.chain_session import ChainSession
from shoal.client.session import Payload
from shoal.client.turnstile import Turnstile


class Sample(Protocol):
    """One sequence to continue."""

    def begin(self, session: ChainSession) -> tuple[Payload, int]:
        """The prompt's rows and how many; the session is open and empty."""

    async def take(self, row: bytes, session: ChainSession) -> Payload | None:
        """The next row, given the last one's answer; None: the sample is over."""

    def end(self) -> None:
        """It is over or failed; called once for each `begin`, even one that raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleLimits:
    """How much of a ring samples may take."""

    at_once: int
    """Samples that hold cache."""
    prompts_at_once: int
    """Samples whose prompts are computed; each has at most one chunk in a pass of a stage."""
    chunk_rows: int | None = None
    """Rows per chunk of a prompt; None: as for sessions alone."""

    def __post_init__(self) -> None:
        if self.at_once < 1 or self.prompts_at_once < 1:
            raise ConfigError("samples need room for at least 1 at once")


async def run_samples(
    open_session: Callable[[], Awaitable[ChainSession]],
    samples: Sequence[Sample],
    turnstile: Turnstile,
    limits: SampleLimits,
) -> dict[int, ShoalError]:
    """Run all samples to their ends, in order of admission; the next one enters as one ends.

    Returns why samples failed, by number: one that fails is no reason to end the others. Only
    where no chain is found any more, those that have not begun fail with it: each of them would
    wait as long for nothing. Cancelling closes every session.
    """
    room = asyncio.Semaphore(limits.at_once)
    prompts = asyncio.Semaphore(limits.prompts_at_once)
    failed: dict[int, ShoalError] = {}
    cut_off: list[NoRouteError] = []

    async def run(number: int) -> None:
        async with room:
            if cut_off:
                failed[number] = cut_off[0]
                return
            try:
                async with await open_session() as session:
                    await _run_one(samples[number], number, session, turnstile, prompts, limits)
            except ShoalError as error:
                failed[number] = error
                if isinstance(error, NoRouteError):
                    cut_off.append(error)
            finally:
                turnstile.leave(number)

    works = [asyncio.ensure_future(run(number)) for number in range(len(samples))]
    try:
        await asyncio.gather(*works)
    finally:
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        turnstile.close()
    return failed


async def _run_one(
    sample: Sample,
    number: int,
    session: ChainSession,
    turnstile: Turnstile,
    prompts: asyncio.Semaphore,
    limits: SampleLimits,
) -> None:
    try:
        payload, count = sample.begin(session)
        async with prompts:
            row = await session.step(payload, count, chunk_tokens=limits.chunk_rows)
        while (following := await sample.take(row, session)) is not None:
            await turnstile.enter(number)
            row = await session.step(following, 1)
    finally:
        sample.end()
