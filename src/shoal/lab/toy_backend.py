"""A BlockBackend of toy blocks, with faults on demand. No torch, no threads.

It also guards the contract from its side: calls that a server must not make raise
InternalError.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shoal.base.adapters import AdapterId, AdapterManifest, AdapterPart
from shoal.base.backend import BackendFacts, Call, Outcome, SequenceId
from shoal.base.errors import (
    AdapterBad,
    BadInput,
    BadOutput,
    ConfigError,
    InternalError,
    ShoalError,
)
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer
from shoal.lab.toy_blocks import (
    ENCODINGS,
    HIDDEN_SIZE,
    TOY_LAYER,
    ToySequence,
    decode_rows,
    encode_rows,
    is_finite,
)
from shoal.lab.training import ToyTrainer
from shoal.wire.tensors import check_payload, row_bytes

ToyFault = Literal["raise", "bad_row", "overflow", "wrong", "poison", "hang"]
"""raise: the whole run fails, with some calls done. bad_row: this call alone fails.
overflow: it fails by its own doing, as a model does whose values leave its dtype.
wrong: this call's output is altered. poison: it is NaN. hang: the run never ends."""

Pace = Callable[[Sequence[Call]], Awaitable[None]]
"""Awaited before each run: how long it takes, or when it may go on."""

FaultChoice = Callable[[Call], ToyFault | None]
"""Asked for each call of each run."""

MODEL: Final = "toy"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    """A toy backend's size and quirks."""

    span: Span
    num_blocks: int
    hidden_size: int = HIDDEN_SIZE
    cache_tokens: int = 1 << 16
    page_tokens: int = 16
    session_tokens_max: int = 1 << 16
    numerics: str = "toy"
    coarse_truncate: int = 1
    """Truncation and forks keep a multiple of this many positions, or everything."""
    calls_per_sequence_max: int = 4
    """Consecutive calls of one sequence in a run."""
    mixes_call_shape: bool = False
    """Outputs depend on each row's `call_count`: proves that replays repeat call shapes."""

    def __post_init__(self) -> None:
        if self.span.end > self.num_blocks:
            raise ConfigError(f"blocks {self.span} of a model with {self.num_blocks}")
        if self.coarse_truncate < 1:
            raise ConfigError(f"coarse_truncate must be at least 1, not {self.coarse_truncate}")
        if self.calls_per_sequence_max < 1:
            raise ConfigError("calls_per_sequence_max must be at least 1")


class ToyBackend:
    """Runs toy blocks; see BlockBackend."""

    def __init__(
        self, config: ToyConfig, *, pace: Pace | None = None, fault: FaultChoice | None = None
    ) -> None:
        self.pace = pace
        self.fault = fault
        self.training = ToyTrainer(lambda: self._facts)
        """Runs training passes; may be replaced."""
        self.runs = 0
        """Finished runs."""
        self.is_closed = False
        self._config = config
        self._sequences: dict[SequenceId, ToySequence] = {}
        self._used: set[SequenceId] = set()
        self._adapters: dict[AdapterId, dict[int, bytes]] = {}
        self._is_running = False
        self._facts = BackendFacts(
            model=MODEL,
            span=config.span,
            num_blocks=config.num_blocks,
            hidden_size=config.hidden_size,
            encodings=ENCODINGS,
            numerics=config.numerics,
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
    def lengths(self) -> dict[SequenceId, int]:
        """Positions held by every open sequence, for invariants."""
        return {sequence: state.length for sequence, state in self._sequences.items()}

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Start an empty sequence; see BlockBackend.open."""
        self._check_new(sequence)
        if adapter is not None and adapter not in self._adapters:
            raise InternalError(f"adapter {adapter} is not loaded in this backend")
        contents = {} if adapter is None else self._adapters[adapter]
        if not self._config.span.covers(span):
            raise InternalError(f"a sequence over {span} in a backend of {self._config.span}")
        self._sequences[sequence] = ToySequence(span, self._config.hidden_size, contents)

    def close(self, sequence: SequenceId) -> None:
        """Free the sequence; see BlockBackend.close."""
        self._check_idle()
        self._sequences.pop(sequence, None)

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget positions from `length` on; see BlockBackend.truncate."""
        self._check_idle()
        state = self._state(sequence)
        state.truncate(self._keepable(state, length))
        return state.length

    def fork(self, parent: SequenceId, child: SequenceId, length: int) -> int:
        """Copy the first `length` positions; see BlockBackend.fork."""
        self._check_new(child)
        state = self._state(parent)
        copy = state.copy(self._keepable(state, length))
        self._sequences[child] = copy
        return copy.length

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run all calls; see BlockBackend.run."""
        self._check_idle()
        per_sequence = Counter(call.sequence for call in calls)
        if max(per_sequence.values(), default=0) > self._config.calls_per_sequence_max:
            raise InternalError("too many calls of one sequence in one run")
        self._is_running = True
        try:
            if self.pace is not None:
                await self.pace(calls)
            faults = [self.fault(call) if self.fault else None for call in calls]
            if "hang" in faults:
                await asyncio.Event().wait()
            failed: set[SequenceId] = set()
            outcomes: list[Outcome] = []
            for call, fault in zip(calls, faults, strict=True):
                outcome = self._outcome(call, fault, call.sequence in failed)
                if isinstance(outcome, ShoalError):
                    failed.add(call.sequence)
                outcomes.append(outcome)
        finally:
            self._is_running = False
        self._check_budget()
        self.runs += 1
        return outcomes

    def check_adapter(self, manifest: AdapterManifest) -> None:
        """Toy blocks have one layer; see BlockBackend.check_adapter."""
        size = self._config.hidden_size
        for block in manifest.within(self._config.span):
            for shape in block.shapes:
                if (shape.target, shape.inputs, shape.outputs) != (TOY_LAYER, size, size):
                    raise AdapterBad(f"toy blocks have {TOY_LAYER} ({size} x {size}), not {shape}")

    async def load_adapter(self, adapter: AdapterId, part: AdapterPart) -> None:
        """Its contents go into every row; see BlockBackend.load_adapter."""
        if adapter in self._adapters:
            raise InternalError(f"adapter {adapter} is loaded already")
        self.check_adapter(part.manifest)
        blocks = part.manifest.within(self._config.span)
        for block in blocks:
            if not is_finite(decode_rows(bytes(part.blocks[block.index]), part.manifest.encoding)):
                raise AdapterBad(f"block {block.index} holds values that are not finite")
        self._adapters[adapter] = {block.index: bytes.fromhex(block.content) for block in blocks}

    async def drop_adapter(self, adapter: AdapterId) -> None:
        """See BlockBackend.drop_adapter."""
        self._adapters.pop(adapter, None)

    def holds_adapter(self, adapter: AdapterId) -> bool:
        """See BlockBackend.holds_adapter."""
        return adapter in self._adapters

    def trainer(self) -> BlockTrainer | None:
        """Runs training passes."""
        return self.training

    async def aclose(self) -> None:
        """Forget everything."""
        self.is_closed = True
        self._sequences.clear()

    def _outcome(self, call: Call, fault: ToyFault | None, has_failed: bool) -> Outcome:
        if has_failed:
            return BadInput(f"the rows before position {call.position} failed in the same run")
        if fault == "raise":
            raise RuntimeError(f"injected: sequence {call.sequence} at {call.position}")
        if fault == "bad_row":
            return BadInput(f"injected: bad row at {call.position}")
        if fault == "overflow":
            return BadOutput(f"injected: values too large at {call.position}")
        try:
            output = self._run_call(call)
        except BadInput as error:
            return error
        if fault == "wrong" and output:
            return bytes([output[0] ^ 1]) + output[1:]
        if fault == "poison":
            return b"\xff" * len(output)
        return output

    def _run_call(self, call: Call) -> bytes:
        state = self._state(call.sequence)
        _check_call(call, state)
        size = self._config.hidden_size
        payload = bytes(call.payload)
        check_payload(call.encoding, size, call.count, len(payload))
        encode_rows(b"", call.output_encoding)  # refuse it before anything changes
        rows = decode_rows(payload, call.encoding)
        if not is_finite(rows):
            raise BadInput("a value is NaN or infinite")
        step = row_bytes("float32", size)
        shape = call.call_count if self._config.mixes_call_shape else 0
        outputs = [
            state.push(rows[start : start + step], shape=shape)
            for start in range(0, len(rows), step)
        ]
        wanted = outputs[len(outputs) - call.rows_wanted :]
        return encode_rows(b"".join(wanted), call.output_encoding)

    def _keepable(self, state: ToySequence, length: int) -> int:
        if length >= state.length:
            return state.length
        return length - length % self._config.coarse_truncate

    def _state(self, sequence: SequenceId) -> ToySequence:
        state = self._sequences.get(sequence)
        if state is None:
            raise InternalError(f"sequence {sequence} is not open in this backend")
        return state

    def _check_new(self, sequence: SequenceId) -> None:
        self._check_idle()
        if sequence in self._used:
            raise InternalError(f"sequence {sequence} was used before: ids are never reused")
        self._used.add(sequence)

    def _check_idle(self) -> None:
        if self._is_running or self.is_closed:
            why = "while a run is in progress" if self._is_running else "after aclose"
            raise InternalError(f"the backend was called {why}")

    def _check_budget(self) -> None:
        held = sum(state.length for state in self._sequences.values())
        if held > self._config.cache_tokens:
            raise InternalError(f"{held} positions in a cache of {self._config.cache_tokens}")


def _check_call(call: Call, state: ToySequence) -> None:
    if call.span != state.span:
        raise BadInput(f"the call wants blocks {call.span}, the sequence has {state.span}")
    if call.position != state.length:
        raise BadInput(f"rows from {call.position} on, but {state.length} positions are held")
    if not 1 <= call.count <= call.call_count:
        raise BadInput(f"{call.count} rows of a call of {call.call_count}")
    if call.rows_wanted not in (0, 1, call.count):
        raise BadInput(f"{call.rows_wanted} of {call.count} rows wanted (0, 1 or all)")


def fixed_pace(*, per_run_s: float = 0.0, per_row_s: float = 0.0) -> Pace:
    """A pace for `ToyBackend`: a run takes `per_run_s` and `per_row_s` for each row."""

    async def pace(calls: Sequence[Call]) -> None:
        await asyncio.sleep(per_run_s + per_row_s * sum(call.count for call in calls))

    return pace


class Gate:
    """A pace that lets runs go one by one, for tests that decide when an iteration ends."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[tuple[Sequence[Call], asyncio.Event]] = asyncio.Queue()

    async def __call__(self, calls: Sequence[Call]) -> None:
        """Wait until the test lets this run go."""
        go = asyncio.Event()
        self._waiting.put_nowait((calls, go))
        await go.wait()

    async def next(self) -> tuple[Sequence[Call], asyncio.Event]:
        """The next run's calls, and the event that lets it go when set."""
        return await self._waiting.get()
