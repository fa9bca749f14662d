"""A BlockBackend that takes the modelled time instead of computing. No torch, no threads.

Its passes take what `ServerSpec` says, on the running loop's clock: virtual in the lab, real
in benchmarks. Rows carry one number each in their first values (`row_of`), and blocks mix it
with a state that depends on all rows before: a lost, repeated or misplaced row changes all
later answers, as with toy blocks, at a tenth of their cost. The rest of a row is padding.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from shoal.base.adapters import AdapterId
from shoal.base.backend import BackendFacts, Call, NoAdapters, Outcome, SequenceId
from shoal.base.errors import BadInput, ConfigError, InternalError, ShoalError
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer
from shoal.plan.spec import ServerSpec
from shoal.wire.tensors import ITEM_BYTES, check_payload, is_finite, row_bytes

MODEL: Final = "cost"

ENCODINGS: Final = ("bfloat16", "float32")
"""What the blocks read and write; both hold a row's number without loss."""

NUMBER_BYTES: Final = 8
"""Values per row that carry its number, a byte each."""

_PRIME: Final = (1 << 61) - 1
_INPUT: Final = 0x5851F42D4C957F2D % _PRIME
_STATE: Final = 0x14057B7EF767814F % _PRIME
_FINITE: Final = 0x3F
"""Highest byte of every value: positive, between 2^-1 and 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostConfig:
    """A cost-model backend's speed and size."""

    server: ServerSpec
    span: Span
    num_blocks: int
    hidden_size: int = 16
    cache_tokens: int = 1 << 16
    page_tokens: int = 16
    session_tokens_max: int = 1 << 16
    calls_per_sequence_max: int = 32

    def __post_init__(self) -> None:
        if self.span.end > self.num_blocks:
            raise ConfigError(f"blocks {self.span} of a model with {self.num_blocks}")
        if self.hidden_size < NUMBER_BYTES:
            raise ConfigError(f"rows of a cost-model backend need {NUMBER_BYTES} values or more")


class CostSequence:
    """One sequence's state in the blocks of a span."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.inputs: list[int] = []
        self._states = _fresh(span)

    def push(self, number: int) -> int:
        """The span's answer to the next position."""
        self.inputs.append(number)
        return self._mix(number)

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`; the states are computed again."""
        if length < len(self.inputs):
            del self.inputs[length:]
            self._states = _fresh(self.span)
            for number in self.inputs:
                self._mix(number)

    def copy(self, length: int) -> CostSequence:
        """A second sequence with the first `length` positions of this one."""
        child = CostSequence(self.span)
        child.inputs = list(self.inputs)
        child._states = list(self._states)
        child.truncate(length)
        return child

    def _mix(self, number: int) -> int:
        states = self._states
        for index, state in enumerate(states):
            states[index] = (state * _STATE + number) % _PRIME
            number = (number * _INPUT + state) % _PRIME
        return number


def _fresh(span: Span) -> list[int]:
    return [(block + 1) * _INPUT % _PRIME for block in range(span.start, span.end)]


def row_of(number: int, hidden_size: int, encoding: str = ENCODINGS[0]) -> bytes:
    """The row that carries `number` (below 2^64).

    Raises:
        BadInput: not one of ENCODINGS.
    """
    item = _item_bytes(encoding)
    row = bytearray(item * hidden_size)
    row[item - 1 :: item] = bytes((_FINITE,)) * hidden_size
    row[item - 2 : item * NUMBER_BYTES : item] = number.to_bytes(NUMBER_BYTES, "little")
    return bytes(row)


def number_of(row: bytes | memoryview, encoding: str = ENCODINGS[0]) -> int:
    """The number that a row carries; any row carries one."""
    item = _item_bytes(encoding)
    return int.from_bytes(bytes(row[item - 2 : item * NUMBER_BYTES : item]), "little")


def prompt_number(token: int) -> int:
    """The number of the row that stands for a token."""
    digest = hashlib.blake2b(token.to_bytes(8, "little"), digest_size=7, person=b"cost").digest()
    return int.from_bytes(digest, "little")


def _item_bytes(encoding: str) -> int:
    if encoding not in ENCODINGS:
        raise BadInput(f"cost-model blocks don't know {encoding!r} (only {', '.join(ENCODINGS)})")
    return ITEM_BYTES[encoding]


def pass_s(server: ServerSpec, calls: Iterable[Call]) -> float:
    """Seconds that one run takes.

    Sequences with one row decode together: each block takes the decode time of the rows
    that pass it. Several rows of a sequence (a chunk, a replay) take prefill time, one
    sequence after the other.
    """
    rows: Counter[SequenceId] = Counter()
    spans: dict[SequenceId, Span] = {}
    for call in calls:
        rows[call.sequence] += call.count
        spans[call.sequence] = call.span
    seconds = 0.0
    decoding: Counter[Span] = Counter()
    for sequence, count in rows.items():
        if count == 1:
            decoding[spans[sequence]] += 1
        else:
            seconds += server.prefill_s(count) * len(spans[sequence])
    borders = sorted({border for span in decoding for border in (span.start, span.end)})
    for start, end in pairwise(borders):
        part = Span(start, end)
        batch = sum(count for span, count in decoding.items() if span.covers(part))
        if batch:
            seconds += server.decode.at(batch) * len(part)
    return seconds


class CostBackend(NoAdapters):
    """Takes time and holds lengths; see BlockBackend."""

    def __init__(self, config: CostConfig) -> None:
        self.slowness = 1.0
        """Passes take this many times as long."""
        self.busy_s = 0.0
        """Spent in runs so far."""
        self._config = config
        self._sequences: dict[SequenceId, CostSequence] = {}
        self._is_running = False
        self._facts = BackendFacts(
            model=MODEL,
            span=config.span,
            num_blocks=config.num_blocks,
            hidden_size=config.hidden_size,
            encodings=ENCODINGS,
            numerics=MODEL,
            is_exact=True,
            cache_tokens=config.cache_tokens,
            page_tokens=config.page_tokens,
            session_tokens_max=config.session_tokens_max,
            calls_per_sequence_max=config.calls_per_sequence_max,
        )

    @property
    def facts(self) -> BackendFacts:
        """What this backend is."""
        return self._facts

    @property
    def held_tokens(self) -> int:
        """Positions held by all sequences together."""
        return sum(len(state.inputs) for state in self._sequences.values())

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Start an empty sequence; see BlockBackend.open."""
        self._check_idle()
        if sequence in self._sequences or not self._config.span.covers(span):
            raise InternalError(f"can't open sequence {sequence} over {span}")
        self._sequences[sequence] = CostSequence(span)

    def close(self, sequence: SequenceId) -> None:
        """Free the sequence; see BlockBackend.close."""
        self._check_idle()
        self._sequences.pop(sequence, None)

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget positions from `length` on; see BlockBackend.truncate."""
        self._check_idle()
        state = self._state(sequence)
        state.truncate(length)
        return len(state.inputs)

    def fork(self, parent: SequenceId, child: SequenceId, length: int) -> int:
        """Copy the first `length` positions; see BlockBackend.fork."""
        self._check_idle()
        copy = self._sequences[child] = self._state(parent).copy(length)
        return len(copy.inputs)

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Take the time of all calls, and answer; see BlockBackend.run."""
        self._check_idle()
        self._is_running = True
        seconds = pass_s(self._config.server, calls) * self.slowness
        self.busy_s += seconds
        try:
            if seconds:
                await asyncio.sleep(seconds)
        finally:
            self._is_running = False
        failed: set[SequenceId] = set()
        outcomes: list[Outcome] = []
        for call in calls:
            outcome = self._outcome(call, call.sequence in failed)
            if isinstance(outcome, ShoalError):
                failed.add(call.sequence)
            outcomes.append(outcome)
        return outcomes

    def trainer(self) -> BlockTrainer | None:
        """None: cost models don't train."""
        return None

    async def aclose(self) -> None:
        """Forget everything."""
        self._sequences.clear()

    def _outcome(self, call: Call, has_failed: bool) -> Outcome:
        if has_failed:
            return BadInput(f"the rows before position {call.position} failed in the same run")
        state = self._state(call.sequence)
        try:
            self._check(call, state)
        except BadInput as error:
            return error
        step = row_bytes(call.encoding, self._config.hidden_size)
        payload = memoryview(call.payload)
        outputs = [
            state.push(number_of(payload[at : at + step], call.encoding))
            for at in range(0, len(payload), step)
        ]
        wanted = outputs[len(outputs) - call.rows_wanted :]
        size = self._config.hidden_size
        return b"".join(row_of(number, size, call.output_encoding) for number in wanted)

    def _check(self, call: Call, state: CostSequence) -> None:
        _item_bytes(call.encoding)
        _item_bytes(call.output_encoding)
        check_payload(
            call.encoding, self._config.hidden_size, call.count, memoryview(call.payload).nbytes
        )
        if not is_finite(call.encoding, call.payload):
            raise BadInput("a value is NaN or infinite")
        if call.span != state.span:
            raise BadInput(f"the call wants blocks {call.span}, the sequence has {state.span}")
        if call.position != len(state.inputs):
            held = len(state.inputs)
            raise BadInput(f"rows from {call.position} on, but {held} positions are held")
        if not 1 <= call.count <= call.call_count or call.rows_wanted not in (0, 1, call.count):
            raise BadInput(
                f"{call.rows_wanted} of {call.count} rows of a call of {call.call_count}"
            )

    def _state(self, sequence: SequenceId) -> CostSequence:
        state = self._sequences.get(sequence)
        if state is None:
            raise InternalError(f"sequence {sequence} is not open in this backend")
        return state

    def _check_idle(self) -> None:
        if self._is_running:
            raise InternalError("the backend was called while a run is in progress")
