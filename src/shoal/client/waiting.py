"""What a session waits for while no chain can be had, as its user is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from shoal.base.errors import NoRouteError, PeerTimeout, PeerUnreachable, ShoalError
from shoal.base.ids import PeerId, SessionId, short
from shoal.base.spans import Span
from shoal.plan.view import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """One session without a chain."""

    missing: tuple[Span, ...]
    """Blocks that nobody runs for us now; none where servers answer but don't take us."""
    lost: tuple[Stage, ...]
    """Hops that the chain had and that are gone; none while it is opened."""
    reason: str
    """Why the last attempt failed."""
    since_s: float
    """Loop time at which the patience began."""
    deadline_s: float
    """Loop time at which the session gives up."""

    def __str__(self) -> str:
        why = self.reason
        if self.missing:
            why = f"no server for blocks {', '.join(map(str, self.missing))}"
        return why + _left(self.lost)


OnWaiting = Callable[[SessionId, Waiting | None], None]
"""Told after each attempt that failed, and with None when the session goes on or ended.
Called on the client's loop: it may neither wait nor raise."""


def waiting_for(
    error: ShoalError,
    before: Sequence[Stage],
    lost: Iterable[PeerId],
    refused: Mapping[PeerId, ShoalError],
    chosen: Sequence[Stage],
    *,
    patience_s: float,
    deadline_s: float,
) -> Waiting:
    """What an attempt that failed with `error` leaves to wait for.

    `before` is the chain that the session had, `chosen` the one that was tried (empty if none
    could be chosen), `refused` who did not follow it.
    """
    silent = PeerUnreachable | PeerTimeout
    dead = {peer for peer, why in refused.items() if isinstance(why, silent)}
    missing = [stage.span for stage in chosen if stage.peer in dead]
    if isinstance(error, NoRouteError) and error.missing:
        missing = [Span(start, end) for start, end in error.missing]
    return Waiting(
        missing=tuple(missing),
        lost=tuple(stage for stage in before if stage.peer in {*lost, *dead}),
        reason=error.detail or type(error).__name__,
        since_s=deadline_s - patience_s,
        deadline_s=deadline_s,
    )


def gave_up(error: ShoalError, waiting: Waiting, now_s: float) -> ShoalError:
    """`error`, of the same type, with how long was waited and who left."""
    waited_s = now_s - waiting.since_s
    detail = f"waited {waited_s:.0f} s: {waiting.reason}{_left(waiting.lost)}"
    if isinstance(error, NoRouteError):
        missing = [(span.start, span.end) for span in waiting.missing]
        return NoRouteError(detail, missing=missing, retry_after_s=error.retry_after_s)
    return type(error)(detail, retry_after_s=error.retry_after_s)


def _left(lost: Sequence[Stage]) -> str:
    gone = ", ".join(f"{short(stage.peer)} {stage.span}" for stage in lost)
    return f"; lost: {gone}" if gone else ""
