"""Keeping a server's record true while it serves: how fast it is now, and where.

When that is news is decided in `shoal.plan.refresh`; a new record costs the whole swarm a
little, so there is one every few minutes at most. What is no news goes along with the record
that is due anyway.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from shoal.plan.coordinates import Coordinate
from shoal.plan.refresh import Standing, is_news, standing
from shoal.plan.spec import DecodeTimes
from shoal.server.announcing import Announcement, Announcer
from shoal.server.engine import Pace

logger = logging.getLogger(__name__)

LOOK_S: Final = 20.0
"""How often a server looks at itself."""

GAP_S: Final = 180.0
"""Between two records that only tell such news: a thousand servers whose machines all slow
down at once make 6 records a second of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshTimes:
    """How often to look, and how often to speak."""

    look_s: float = LOOK_S
    gap_s: float = GAP_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Block times as measured at the start, on a machine that did nothing else."""

    decode: DecodeTimes
    prefill_s_per_block_token: float


class Refresher:
    """Looks at a running server, and has its record say what changed."""

    def __init__(
        self,
        announcer: Announcer,
        pace: Callable[[], Pace],
        coordinate: Callable[[], Coordinate | None],
        times: RefreshTimes | None = None,
        *,
        sent_bytes_per_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`announcer` says now what was measured at the start."""
        self.records = 0
        """Published so far because of news."""
        self._announcer = announcer
        self._pace = pace
        self._coordinate = coordinate
        self._sent_bytes_per_s = sent_bytes_per_s
        self._times = times or RefreshTimes()
        self._measured = _measured_of(announcer.announcement)
        self._now = self._said = Standing()

    async def run(self) -> None:
        """Look again and again, until cancelled.

        Raises:
            ConfigError: nobody would accept our record (as `Announcer.announce`).
        """
        while True:
            await asyncio.sleep(self._times.look_s)
            if self.look():
                await self._announcer.repeat()
                self.records += 1
                await asyncio.sleep(self._times.gap_s - self._times.look_s)

    def look(self) -> bool:
        """Have the next record say what holds now; whether that is news."""
        announcer, pace = self._announcer, self._pace()
        self._said = _said_by(announcer.published, self._measured, self._said)
        now_s = asyncio.get_running_loop().time()
        self._now = standing(
            self._now, self._measured.decode, pace.passes, now_s, self._coordinate()
        )
        said = _restated(announcer.announcement, self._measured, self._now)
        rate = self._sent_bytes_per_s()  # no news, but goes along with the next record
        announcer.restate(said if rate is None else replace(said, sent_bytes_per_s=rate))
        found = is_news(self._said, self._now)
        if found:
            logger.info("record is out of date slowness=%.2f said=%.2f",
                        self._now.slowness, self._said.slowness)  # fmt: skip
        return found


def _measured_of(said: Announcement) -> Measured:
    points = said.decode_s_by_batch or ((1, said.decode_s_per_block),)
    return Measured(
        decode=DecodeTimes(points=points),
        prefill_s_per_block_token=said.prefill_s_per_block_token,
    )


def _said_by(said: Announcement, measured: Measured, before: Standing) -> Standing:
    """What a record says, compared with what was measured."""
    first_s = measured.decode.at(1)
    slowness = said.decode_s_per_block / first_s if first_s else before.slowness
    return Standing(slowness=slowness or before.slowness, coordinate=said.coordinate)


def _restated(said: Announcement, measured: Measured, now: Standing) -> Announcement:
    points = said.decode_s_by_batch and tuple(
        (batch, seconds * now.slowness) for batch, seconds in measured.decode.points
    )
    return replace(
        said,
        decode_s_per_block=measured.decode.at(1) * now.slowness,
        decode_s_by_batch=points,
        prefill_s_per_block_token=measured.prefill_s_per_block_token * now.slowness,
        coordinate=now.coordinate,
    )
