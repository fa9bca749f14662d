"""Sliding windows through the backends: small caches, honest cuts, the same results."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache

import pytest

from shoal.base.backend import BlockBackend, Call, SequenceId
from shoal.base.errors import BadInput
from shoal.base.spans import Span
from shoal.model.batched_backend import BatchedBackend
from shoal.model.block_rows import PAGE_TOKENS, ROLLBACK_TOKENS, kept_tokens
from shoal.model.facts import model_facts
from shoal.model.torch_backend import (
    BackendConfig,
    EngineChoice,
    ExactChoice,
    TorchBackend,
    load_backend,
)
from tests.models import tiny_config, tiny_source
from tests.unit.exact_cases import rows_at

Engine = tuple[EngineChoice, ExactChoice]

WINDOW = 9
BLOCKS = 4
SPAN = Span(0, BLOCKS)
HIDDEN = 32
ENGINES: list[Engine] = [("per-session", "never"), ("batched", "never"), ("batched", "always")]
FAMILIES = ["phi3_sliding", "gemma2"]
"""All blocks slide; every other one does."""

CALLS = (50, 23, 50, 50, 23, *[8] * 7, *[1] * 8)
"""Chunks, drafts, single rows."""
LENGTH = sum(CALLS)


@cache
def backend(family: str, engine: EngineChoice, exact: ExactChoice) -> BlockBackend:
    config = BackendConfig(model=family, engine=engine, exact=exact)
    return load_backend(tiny_source(family), SPAN, config)


@pytest.fixture(params=ENGINES, ids="-".join)
def engine(request: pytest.FixtureRequest) -> Engine:
    chosen: Engine = request.param
    return chosen


class Sequences:
    """Sequences of one backend; a row's values come from its position and a seed."""

    def __init__(self, target: BlockBackend) -> None:
        self.target = target
        self._next = 0

    def open(self) -> SequenceId:
        sequence = self.new_id()
        self.target.open(sequence, SPAN)
        return sequence

    def new_id(self) -> SequenceId:
        self._next += 1
        return SequenceId(self._next)

    def run(self, sequence: SequenceId, start: int, count: int, seed: int = 1) -> bytes:
        rows = rows_at(seed, start, count, HIDDEN)
        (outcome,) = asyncio.run(self.target.run([self.call(sequence, start, count, rows)]))
        assert isinstance(outcome, bytes), outcome
        return outcome

    def call(self, sequence: SequenceId, start: int, count: int, rows: bytes) -> Call:
        return Call(
            sequence=sequence,
            span=SPAN,
            position=start,
            count=count,
            call_count=count,
            payload=rows,
            encoding="float32",
            output_encoding="float32",
            rows_wanted=count,
        )

    def grow(self, sequence: SequenceId, length: int = LENGTH) -> None:
        """Run the first `length` rows of CALLS."""
        start = 0
        for count in CALLS:
            if start < length:
                self.run(sequence, start, count)
                start += count
        assert start == length

    def close_all(self) -> None:
        for number in range(1, self._next + 1):
            self.target.close(SequenceId(number))


@pytest.fixture(params=FAMILIES)
def sequences(request: pytest.FixtureRequest, engine: Engine) -> Iterator[Sequences]:
    made = Sequences(backend(request.param, *engine))
    yield made
    made.close_all()


def test_cuts_and_forks_within_the_margin_keep_the_bits(sequences: Sequences) -> None:
    kept = LENGTH - ROLLBACK_TOKENS
    straight, cut, child = sequences.open(), sequences.open(), sequences.new_id()
    sequences.grow(straight, kept)
    expected = [sequences.run(straight, kept, 12), sequences.run(straight, kept + 12, 1)]
    sequences.grow(cut)
    assert sequences.target.fork(cut, child, kept) == kept
    assert sequences.target.truncate(cut, kept) == kept
    for sequence in (cut, child):
        again = [sequences.run(sequence, kept, 12), sequences.run(sequence, kept + 12, 1)]
        # All calls had the same shapes, so it takes no exact mode for equal bits.
        assert again == expected


def test_cuts_beyond_the_margin_start_again(sequences: Sequences) -> None:
    fresh, cut, child = sequences.open(), sequences.open(), sequences.new_id()
    expected = sequences.run(fresh, 0, 30)
    sequences.grow(cut)
    assert sequences.target.fork(cut, child, WINDOW + 1) == 0
    assert sequences.target.truncate(cut, WINDOW + 1) == 0
    for sequence in (cut, child):
        assert sequences.run(sequence, 0, 30) == expected


def test_short_sequences_are_cut_anywhere(sequences: Sequences) -> None:
    sequence = sequences.open()
    sequences.grow(sequence, CALLS[0] + CALLS[1])
    assert WINDOW < CALLS[0] + CALLS[1] <= kept_tokens(WINDOW) + PAGE_TOKENS
    for length in (60, 31, 5, 1):
        child = sequences.new_id()
        assert sequences.target.fork(sequence, child, length) == length
        assert sequences.target.truncate(sequence, length) == length
        assert sequences.run(child, length, 3) == sequences.run(sequence, length, 3)


def test_a_failed_call_changes_nothing(sequences: Sequences) -> None:
    straight, hurt = sequences.open(), sequences.open()
    for sequence in (straight, hurt):
        sequences.grow(sequence)
    bad = rows_at(1, LENGTH, 90, HIDDEN)[:-4] + b"\x00\x00\xc0\x7f"
    (outcome,) = asyncio.run(sequences.target.run([sequences.call(hurt, LENGTH, 90, bad)]))
    assert isinstance(outcome, BadInput)
    assert sequences.run(hurt, LENGTH, 1) == sequences.run(straight, LENGTH, 1)
    assert sequences.target.truncate(hurt, LENGTH - 60) == LENGTH - 60


def test_a_sliding_sequence_stops_growing(engine: Engine) -> None:
    sequences = Sequences(backend("phi3_sliding", *engine))
    sequence = sequences.open()
    sizes: list[int] = []
    assert isinstance(sequences.target, BatchedBackend | TorchBackend)
    for start in range(0, 400, 10):
        sequences.run(sequence, start, 10)
        sizes.append(sequences.target._cache(sequence).num_bytes)
    facts = model_facts(tiny_config("phi3_sliding"))
    per_position = sum(facts.kv_bytes_per_token["float32"])
    positions = kept_tokens(WINDOW) * 5 // 4 + 2 * PAGE_TOKENS
    assert max(sizes) <= per_position * positions
    assert sizes[-1] <= sizes[20]
    assert max(sizes) < per_position * 400 // 2
    sequences.close_all()


def test_full_blocks_beside_sliding_ones_keep_everything(engine: Engine) -> None:
    sequences = Sequences(backend("gemma2", *engine))
    sequence = sequences.open()
    sequences.grow(sequence)
    assert isinstance(sequences.target, BatchedBackend | TorchBackend)
    held = sequences.target._cache(sequence).num_bytes
    per_position = sum(model_facts(tiny_config("gemma2")).kv_bytes_per_token["float32"])
    assert per_position * LENGTH // 2 < held < per_position * LENGTH
    sequences.close_all()
