"""Whether the other end of a data link still hears us. Pure: clocks are handed in.

A path may swallow what it carries without the stream ever breaking. Whoever waits for an
acknowledgement can't tell that from a busy engine, so it asks; who gets a question answers at
once, whatever its engine does. A question is an `Open` of no session: the answer is `Stale`.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from typing import Final

from shoal.base.ids import SessionId
from shoal.base.limits import ALIVE_MISSED_MAX, ALIVE_PERIOD_S
from shoal.wire.messages import Open

QUESTION: Final = Open(SessionId(bytes(16)), 0, 0)
"""Sessions have random names; nobody has this one."""

SILENT_S: Final = ALIVE_MISSED_MAX * ALIVE_PERIOD_S
"""As long as a server may leave its client's pings without an answer. In it two questions
are asked, so a lost one does no harm."""

ADOPTED_SILENT_S: Final = 10.0
"""The same where the receiver dialled: it misses its rows itself and dials anew, so this is only
for what it has left. A busy client, or one that was stopped for a while, keeps its stream."""

SLOW_BYTES_PER_S: Final = 64 << 10
"""Half a megabit: a path that carries at least this is waited for, as questions and answers
come after all that was sent before."""

ROUND_TRIP_S_MAX: Final = 1.0
"""More is not believed of a path, or each late answer would make us wait longer."""

QUESTIONS_MAX: Final = 1024
"""Eight minutes of them: more is on no path."""

PATIENCE_DOUBLINGS: Final = 5
"""A peer that answers, and does nothing else, is asked more and more seldom, at last every 16 s,
until something is sent again: sessions may lie idle with rows that were never worked off."""

STOOD_STILL_S: Final = 1.0
"""Who looks so late was stopped itself: what came meanwhile is heard first."""


class Judgement(Enum):
    """What to do now."""

    WAIT = "wait"
    ASK = "ask"
    GIVE_UP = "give up"


class Hearing:
    """What was sent and heard on one stream."""

    def __init__(self, silent_s: float = SILENT_S) -> None:
        """`silent_s`: after how long without a word the stream is given up."""
        self._silent_s = silent_s
        self._since_s: float | None = None
        """Since when we wait for a word."""
        self._questions: deque[tuple[float, int]] = deque(maxlen=QUESTIONS_MAX)
        """Those without an answer, the oldest first: when, and how many bytes were sent before."""
        self._asked_s: tuple[float, float] | None = None
        """When we asked first, and last, since we heard anything."""
        self._num_idle = 0
        """Answers in a row in which nothing else was sent or heard."""
        self._looked_s: float | None = None
        self._sent_bytes = 0
        self._carried_bytes = 0
        """Of these, what has arrived for sure."""
        self._round_trip_s = 0.0
        self._allowance_s = 0.0

    def sent(self, num_bytes: int, now_s: float) -> None:
        """Something goes out that will be answered."""
        self._sent_bytes += num_bytes
        if self._since_s is None or self._num_idle:
            self._since_s, self._num_idle = now_s, 0

    def heard(self, now_s: float, *, is_answer: bool) -> None:
        """Something came that only answers what we sent; `is_answer`: to a question.

        Answers come in the order of questions, after all that was sent before.
        """
        self._since_s, self._asked_s = now_s, None
        self._num_idle = self._num_idle + 1 if is_answer else 0
        if is_answer and self._questions:
            asked_s, self._carried_bytes = self._questions.popleft()
            self._round_trip_s = min(ROUND_TRIP_S_MAX, now_s - asked_s)

    def look(self, now_s: float, *, is_owed: bool, unacked_bytes: int) -> Judgement:
        """What to do; `is_owed`: something was sent that is not acknowledged."""
        before_s, self._looked_s = self._looked_s, now_s
        if not is_owed:
            self._since_s = self._asked_s = None
            self._carried_bytes = self._sent_bytes
            self._questions.clear()
            return Judgement.WAIT
        if self._since_s is None or (before_s is not None and now_s - before_s > STOOD_STILL_S):
            self._since_s, self._asked_s = now_s, None
        on_the_way = min(unacked_bytes, self._sent_bytes - self._carried_bytes)
        self._allowance_s = 2 * self._round_trip_s + on_the_way / SLOW_BYTES_PER_S
        if now_s >= self._gives_up_s():
            return Judgement.GIVE_UP
        if now_s < self._asks_s(self._since_s):
            return Judgement.WAIT
        self._questions.append((now_s, self._sent_bytes))
        self._asked_s = now_s if self._asked_s is None else self._asked_s[0], now_s
        return Judgement.ASK

    def wait_s(self, now_s: float) -> float:
        """When to look again, at the latest."""
        if self._since_s is None:
            return ALIVE_PERIOD_S
        next_s = min(self._asks_s(self._since_s), self._gives_up_s())
        return min(ALIVE_PERIOD_S, max(0.0, next_s - now_s))

    def _asks_s(self, since_s: float) -> float:
        if self._asked_s is not None:
            return self._asked_s[1] + ALIVE_PERIOD_S
        return since_s + ALIVE_PERIOD_S * 2.0 ** min(self._num_idle, PATIENCE_DOUBLINGS)

    def _gives_up_s(self) -> float:
        """Never without having asked."""
        if self._asked_s is None:
            return math.inf
        return self._asked_s[0] + self._silent_s - ALIVE_PERIOD_S + self._allowance_s
