"""The BlockBackends under test, and a bookkeeper that knows what each must answer."""

from __future__ import annotations

import array
import asyncio
import importlib.util
import itertools
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shoal.base.backend import BlockBackend, Call, Outcome, SequenceId
from shoal.base.errors import ShoalError
from shoal.base.spans import Span
from shoal.lab.cost_backend import CostBackend, CostConfig
from shoal.lab.toy_backend import ToyBackend, ToyConfig
from shoal.lab.toy_blocks import expected_output
from shoal.plan.spec import DecodeTimes, ServerSpec
from shoal.server.switching import SwitchingBackend
from shoal.wire.tensors import row_bytes

if TYPE_CHECKING:
    from shoal.model.torch_backend import EngineChoice, ExactChoice

SPAN = Span(1, 5)
"""What every backend under test serves."""

TOLERANCE = 2e-5
"""Largest difference between two float32 ways to run tiny blocks, absolute and relative to
the largest value of a call: sums of large values leave their rounding on small ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One kind of backend."""

    name: str
    make: Callable[[], BlockBackend]
    is_bit_exact: bool
    """Whether every order of calls gives the same bits."""
    num_examples: int
    length_max: int = 24
    """Longest sequence of the state machine: recomputation stays cheap."""
    chunk_max: int = 9
    """Most rows of one of its calls."""
    tolerance: float = TOLERANCE


def _toy(coarse: int = 1) -> BlockBackend:
    config = ToyConfig(span=SPAN, num_blocks=6, coarse_truncate=coarse, calls_per_sequence_max=9)
    return ToyBackend(config)


def _cost() -> BlockBackend:
    server = ServerSpec(name="s", memory_bytes=0, decode=DecodeTimes(points=((1, 0.0),)))
    return CostBackend(CostConfig(server=server, span=SPAN, num_blocks=6))


def _switching(make: Callable[[], BlockBackend], *, is_over: bool) -> BlockBackend:
    """One that has just got a second backend, or has lost the first again."""
    backend = SwitchingBackend(make())
    backend.open(SequenceId(0), SPAN)
    backend.add(make())
    if is_over:
        backend.close(SequenceId(0))
        asyncio.run(backend.drop_old())
    return backend


def _torch() -> BlockBackend:
    from tests.models import tiny_torch_backend

    backend: BlockBackend = tiny_torch_backend(span=SPAN)
    return backend


def _batched(exact: ExactChoice) -> BlockBackend:
    from tests.models import tiny_batched_backend

    backend: BlockBackend = tiny_batched_backend(span=SPAN, exact=exact)
    return backend


def _family(family: str, engine: EngineChoice, exact: ExactChoice) -> BlockBackend:
    from shoal.model.torch_backend import BackendConfig, load_backend
    from tests.models import tiny_source

    config = BackendConfig(model=family, engine=engine, exact=exact)
    return load_backend(tiny_source(family, blocks=6), SPAN, config)


def _odd(family: str, engine: EngineChoice, exact: ExactChoice = "never") -> Subject:
    """A family whose caches have a shape of their own."""
    is_sliding = family in ("gemma2", "phi3_sliding")
    return Subject(
        name=f"{family}-{engine}{'-exact' * (exact == 'always')}",
        make=partial(_family, family, engine, exact),
        is_bit_exact=False,
        num_examples=4,
        # Sliding windows of 9 tokens: far beyond them, their margin and whole pages.
        length_max=180 if is_sliding else 24,
        chunk_max=60 if is_sliding else 9,
        # The delta rule sums in another order when it takes many rows at once.
        tolerance=2e-4 if family == "qwen3_next" else TOLERANCE,
    )


ODD_SUBJECTS: list[Subject] = []
"""More kinds of cache, for the state machine."""

SUBJECTS = [
    Subject(name="toy", make=_toy, is_bit_exact=True, num_examples=60),
    Subject(name="toy-coarse", make=lambda: _toy(4), is_bit_exact=True, num_examples=60),
    Subject(name="cost", make=_cost, is_bit_exact=False, num_examples=30, tolerance=0.0),
]
if importlib.util.find_spec("tests.models") is not None:
    SUBJECTS += [
        Subject(name="torch", make=_torch, is_bit_exact=False, num_examples=12),
        Subject(
            name="batched", make=lambda: _batched("never"), is_bit_exact=False, num_examples=12
        ),
        Subject(name="exact", make=lambda: _batched("always"), is_bit_exact=False, num_examples=12),
    ]
    ODD_SUBJECTS = [
        _odd("gemma2", "batched"),
        _odd("phi3_sliding", "batched", "always"),
        _odd("gemma2", "per-session"),
        _odd("bloom", "per-session"),
        _odd("falcon_alibi", "per-session"),
        _odd("mamba2", "per-session"),
        _odd("qwen3_next", "per-session"),
    ]


def random_rows(rng: random.Random, hidden_size: int, count: int) -> list[bytes]:
    """Float32 rows with values like real hidden states."""
    return [
        struct.pack(f"<{hidden_size}f", *(rng.gauss(0, 1) for _ in range(hidden_size)))
        for _ in range(count)
    ]


class Held:
    """What one sequence of the backend must hold."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.inputs: list[bytes] = []


class Bench:
    """A backend on its own event loop, beside what it must answer."""

    def __init__(self, subject: Subject, seed: int = 0) -> None:
        self.subject = subject
        self.backend = subject.make()
        self.facts = self.backend.facts
        self.held: dict[SequenceId, Held] = {}
        self._rng = random.Random(seed)
        self._numbers = itertools.count(1)
        self._runner = asyncio.Runner()

    def close(self) -> None:
        self._runner.run(self.backend.aclose())
        self._runner.close()

    def open(self, span: Span = SPAN) -> SequenceId:
        sequence = SequenceId(next(self._numbers))
        self.backend.open(sequence, span)
        self.held[sequence] = Held(span)
        return sequence

    def drop(self, sequence: SequenceId) -> None:
        self.backend.close(sequence)
        del self.held[sequence]

    def truncate(self, sequence: SequenceId, length: int) -> None:
        held = self.held[sequence]
        actual = self.backend.truncate(sequence, length)
        assert 0 <= actual <= min(length, len(held.inputs))
        del held.inputs[actual:]

    def fork(self, parent: SequenceId, length: int) -> SequenceId:
        child = SequenceId(next(self._numbers))
        held = self.held[parent]
        actual = self.backend.fork(parent, child, length)
        assert 0 <= actual <= min(length, len(held.inputs))
        self.held[child] = Held(held.span)
        self.held[child].inputs = held.inputs[:actual]
        return child

    def rows(self, count: int) -> list[bytes]:
        return random_rows(self._rng, self.facts.hidden_size, count)

    def split(self, rows: bytes, encoding: str = "float32") -> list[bytes]:
        """Each row by itself."""
        step = row_bytes(encoding, self.facts.hidden_size)
        return [rows[at : at + step] for at in range(0, len(rows), step)]

    def call(
        self,
        sequence: SequenceId,
        rows: Sequence[bytes],
        rows_wanted: int | None = None,
        *,
        encoding: str = "float32",
        output_encoding: str = "float32",
    ) -> Call:
        """The call that appends `rows`; all outputs wanted unless said otherwise."""
        held = self.held[sequence]
        return Call(
            sequence=sequence,
            span=held.span,
            position=len(held.inputs),
            count=len(rows),
            call_count=len(rows),
            payload=b"".join(rows),
            encoding=encoding,
            output_encoding=output_encoding,
            rows_wanted=len(rows) if rows_wanted is None else rows_wanted,
        )

    def run_raw(self, calls: Sequence[Call]) -> list[Outcome]:
        """The outcomes, unchecked; nothing is booked."""
        return self._runner.run(self._run(calls))

    async def _run(self, calls: Sequence[Call]) -> list[Outcome]:
        return await self.backend.run(calls)

    def run(self, *calls: Call) -> None:
        """Run float32 calls that must succeed; compare with recomputation, and book."""
        outcomes = self.run_raw(calls)
        assert len(outcomes) == len(calls)
        for call, outcome in zip(calls, outcomes, strict=True):
            assert not isinstance(outcome, ShoalError), outcome
            held = self.held[call.sequence]
            held.inputs += self.split(bytes(call.payload))
            expected = self.recomputed(held.span, held.inputs)
            self.check_equal(outcome, b"".join(expected[len(expected) - call.rows_wanted :]))

    def recomputed(self, span: Span, inputs: Sequence[bytes]) -> list[bytes]:
        """All outputs for `inputs`, from scratch in one call of a fresh sequence."""
        if self.subject.is_bit_exact:
            return expected_output(span, inputs, hidden_size=self.facts.hidden_size)
        fresh = self.open(span)
        (outcome,) = self.run_raw([self.call(fresh, inputs)])
        self.drop(fresh)
        assert isinstance(outcome, bytes), outcome
        return self.split(outcome)

    def check_equal(self, actual: bytes, expected: bytes) -> None:
        if self.subject.is_bit_exact:
            assert actual == expected
            return
        assert len(actual) == len(expected)
        mine, theirs = array.array("f", actual), array.array("f", expected)
        bound = self.subject.tolerance * (1 + max(map(abs, theirs), default=0.0))
        assert all(abs(one - other) <= bound for one, other in zip(mine, theirs, strict=True))
