"""What one client's load may cost the others: how engine time is shared between owners.

Nothing here binds a client that is alone. As soon as another one decodes, a client gets a
few decode rows per iteration, which cost the others little, and one prefill chunk at a
time (replays too), after which the others' answers go on for a while: for so many tokens
that the delay by the chunk, at every hop of their chains, makes their mean time per token
at most twice as long.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final, NamedTuple

from shoal.base.backend import SequenceId
from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.server.quotas import CLOCK_STEP_S

ACTIVE_S: Final = 1.0
"""Who decoded a row this recently will send the next one soon: longer than a token takes on
most chains, so that a client isn't forgotten while its token is elsewhere. Chunks on its way
come on top."""

ROWS_PER_CLIENT: Final = 16
"""Decode rows of one client per iteration while others decode too. Measured (1.1B shape,
bfloat16, one core): 16 rows take 1.3 times as long as one, 32 take 1.5 times."""

SLOWDOWN_MAX: Final = 2.0
"""How many times as long a token may take, on average, because of other clients' chunks."""

HOLD_MAX: Final = 8.0
"""A client whose chunks wait for others' answers waits at most this many times as long as the
last chunk took, so that a prompt gets on even where hundreds decode."""

HOPS_BELIEVED: Final = 16
"""Chains are seldom longer; what a route says beyond it would only hold up others."""

OUTLIER: Final = 4.0
"""An iteration whose rows take this many times as long as usual was interrupted."""

_CHUNK_RUNS = 9
"""So many of the last iterations with chunks tell what is usual."""

_INTERVALS = 64
"""The quickest of a session's last tokens tells how long one takes undisturbed."""

_DECODE_RUNS = 16
"""The quickest of the last iterations without a chunk tells what a row takes here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FairLimits:
    """How much of the engine one client may take while others want it."""

    rows_per_client: int = ROWS_PER_CLIENT
    slowdown_max: float = SLOWDOWN_MAX

    def __post_init__(self) -> None:
        if self.rows_per_client < 1:
            raise ConfigError("a client needs at least 1 row per iteration")
        if not self.slowdown_max > 1:
            raise ConfigError(f"a slowdown of {self.slowdown_max}: it must be above 1")


class Ran(NamedTuple):
    """A session whose rows were in an iteration."""

    sequence: SequenceId
    owner: PeerId
    num_hops: int
    is_decode: bool


@dataclass(slots=True, kw_only=True)
class _Answer:
    """A session that decodes."""

    owner: PeerId
    num_hops: int
    ran_s: float
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=_INTERVALS))
    tokens_due: int = 0
    """Tokens that it must get before the next chunk of somebody else."""

    def until_s(self, chunk_s: float) -> float:
        """When it is forgotten, unless it goes on; a chunk at each hop may delay it."""
        return self.ran_s + ACTIVE_S + self.num_hops * chunk_s


class Fairness:
    """Who decodes, and when chunks may run. Clocks are handed in."""

    def __init__(self, limits: FairLimits) -> None:
        self._limits = limits
        self._answers: dict[SequenceId, _Answer] = {}
        """Sessions that decode."""
        self._chunks_s: dict[PeerId, float] = {}
        """When each owner's chunks last ran."""
        self._held_s: dict[PeerId, float] = {}
        """Since when each owner's chunks wait for others' answers."""
        self._chunk_s = 0.0
        """How long the last iteration with chunks took."""
        self._chunk_rows_s: deque[float] = deque(maxlen=_CHUNK_RUNS)
        """How long a row took in each of the last iterations with chunks."""
        self._decode_runs_s: deque[float] = deque(maxlen=_DECODE_RUNS)

    def ran(
        self, items: Iterable[Ran], started_s: float, ended_s: float, num_tokens: int = 1
    ) -> None:
        """An iteration ran `num_tokens` rows of these sessions."""
        chunk_owners: set[PeerId] = set()
        for item in items:
            if item.is_decode:
                self._decoded(item, started_s)
            else:
                self._answers.pop(item.sequence, None)
                chunk_owners.add(item.owner)
                self._chunks_s[item.owner] = ended_s
                self._held_s.pop(item.owner, None)
        duration_s = ended_s - started_s
        if not chunk_owners:
            self._decode_runs_s.append(duration_s)
            return
        duration_s = self._chunk_s = self._believed(duration_s, num_tokens)
        for answer in self._answers.values():
            if chunk_owners != {answer.owner}:
                answer.tokens_due = self._tokens_due(answer, duration_s)

    def _believed(self, chunk_s: float, num_tokens: int) -> float:
        """A chunk's duration, without what the process stood still in it.

        Else a server that was stopped for a while would hold back chunks for as long again.
        """
        row_s = chunk_s / num_tokens
        usual_s = median(self._chunk_rows_s) if self._chunk_rows_s else row_s
        self._chunk_rows_s.append(row_s)
        return min(chunk_s, OUTLIER * usual_s * num_tokens)

    def _tokens_due(self, answer: _Answer, chunk_s: float) -> int:
        """Tokens over which a delay of `chunk_s` at each hop is bearable.

        A token takes at least a decode iteration at each hop. That it takes longer (slow
        links) is believed only after many tokens, since chunks may have delayed the first.
        """
        if chunk_s <= 0:
            return 0
        row_s = min(self._decode_runs_s, default=0.0)
        token_s = max(answer.num_hops * row_s, chunk_s / HOLD_MAX)
        if len(answer.intervals) == _INTERVALS:
            token_s = max(token_s, min(answer.intervals))
        delay = chunk_s * answer.num_hops / token_s
        # One more: a row that comes amid a chunk may find the next one beside it.
        return 1 + math.ceil(delay / (self._limits.slowdown_max - 1))

    def _decoded(self, item: Ran, started_s: float) -> None:
        answer = self._answers.pop(item.sequence, None)
        if answer is None:
            hops = min(item.num_hops, HOPS_BELIEVED)
            answer = _Answer(owner=item.owner, num_hops=hops, ran_s=started_s)
        else:
            answer.intervals.append(started_s - answer.ran_s)
            answer.ran_s = started_s
            answer.tokens_due = max(0, answer.tokens_due - 1)
        self._answers[item.sequence] = answer

    def keep_only(self, sequences: Collection[SequenceId], owners: Collection[PeerId]) -> None:
        """Forget sessions that ended, and owners that have none."""
        for sequence in self._answers.keys() - sequences:
            del self._answers[sequence]
        for table in (self._chunks_s, self._held_s):
            for owner in table.keys() - owners:
                del table[owner]

    def is_in_company(self, owners: Collection[PeerId], now_s: float) -> bool:
        """Whether more than one client decodes; `owners` have decode rows that wait."""
        self._expire(now_s)
        return len({answer.owner for answer in self._answers.values()} | set(owners)) > 1

    def chunk_waits_s(self, owners: Collection[PeerId], now_s: float) -> dict[PeerId, float]:
        """How long the chunks of these owners, which wait, must wait yet if no token comes.

        Owners whose chunks may run are left out.
        """
        self._expire(now_s)
        due: dict[PeerId, float] = {}
        for answer in self._answers.values():
            if answer.tokens_due:
                until_s = answer.until_s(self._chunk_s)
                due[answer.owner] = max(until_s, due.get(answer.owner, until_s))
        latest = sorted(due.items(), key=lambda item: item[1], reverse=True)[:2]
        waits: dict[PeerId, float] = {}
        for owner in owners:
            until_s = next((at_s for other, at_s in latest if other != owner), now_s)
            held_s = self._held_s.setdefault(owner, now_s)
            wait_s = min(until_s, held_s + HOLD_MAX * self._chunk_s) - now_s
            if wait_s > CLOCK_STEP_S:
                waits[owner] = wait_s
        return waits

    def last_chunk_s(self, owner: PeerId) -> float:
        """When the owner's chunks last ran; who waited longest goes first."""
        return self._chunks_s.get(owner, 0.0)

    def _expire(self, now_s: float) -> None:
        for sequence, answer in list(self._answers.items()):
            if answer.until_s(self._chunk_s) <= now_s:
                del self._answers[sequence]
