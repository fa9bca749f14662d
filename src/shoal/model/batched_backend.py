"""Blocks on torch, the rows of all sequences in as few passes as possible.

A run becomes passes. *Packed*: one pass for everything. *Exact*: a call that computes many
rows (a prefill chunk) is a pass of its own, in the shape that first computed it; all other
rows share passes whose row counts are stable tiles (`exact.py`) and attend by position. A
row's bits then depend on its call's shape alone, never on company, and replaying the same
calls gives the same bits.
Shapes: T rows of a pass, D hidden size.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import Final

import torch

from shoal.base.adapters import AdapterId
from shoal.base.backend import BackendFacts, Call, Outcome, SequenceId
from shoal.base.errors import BadInput, InternalError, ShoalError
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer
from shoal.model.adapter_sequences import AdaptedSequences
from shoal.model.calls import answer_to, check_call, rows_of
from shoal.model.exact import RowTiles
from shoal.model.lora_pass import LoraRun
from shoal.model.lora_rows import LoraLayers
from shoal.model.packed_attention import Piece
from shoal.model.packed_cache import PackedCache
from shoal.model.packed_model import PackedModel
from shoal.model.sharing import Loaded
from shoal.model.training import TorchTrainer

_log = logging.getLogger(__name__)

SMALL_CALL_ROWS: Final = 8
"""Calls of up to this many rows (decode, drafts to verify) share tiles in exact mode. One
attention call per row costs more than one per call, but far less than a pass of its own."""


CALLS_PER_SEQUENCE_MAX: Final = 32
"""Calls of one sequence in a run: a tile full of decode rows that are replayed."""

_BROKEN: Final = -1
"""Where a sequence ends after a call that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A checked call, ready to run."""

    index: int
    """Which call it is."""
    call: Call
    piece: Piece
    rows: torch.Tensor
    """(T, D), padding included."""
    adapter: AdapterId | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Parts that go through the blocks together."""

    parts: tuple[_Part, ...]
    is_tiled: bool
    """Whether each block gets a stable number of rows."""


class BatchedBackend(AdaptedSequences[PackedCache]):
    """`shoal.base.backend.BlockBackend` over packed rows. Made by `load_backend`."""

    def __init__(
        self,
        model: PackedModel,
        facts: BackendFacts,
        tiles: RowTiles | None,
        device: str,
        loaded: Loaded,
    ) -> None:
        thread = loaded.use.thread
        layers = LoraLayers(facts.span, model.named_modules, device, is_exact=tiles is not None)
        super().__init__(
            facts.span, partial(PackedCache, model.windows), PackedCache.forked, layers, thread
        )
        self._model = model
        self._facts = facts
        self._tiles = tiles
        self._device = device
        self._thread = thread
        self._loaded_as = loaded
        self._trainer = TorchTrainer(
            model.spans, lambda: self._facts, device, thread, runner=model, is_packed=True
        )

    @property
    def facts(self) -> BackendFacts:
        """What this backend is."""
        return self._facts

    @property
    def loaded(self) -> Loaded:
        """What another backend may take over."""
        return self._loaded_as

    @property
    def tiles(self) -> RowTiles | None:
        """The row counts of exact mode; None when packed."""
        return self._tiles

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run all calls; one outcome each."""
        per_sequence = Counter(call.sequence for call in calls)
        limit = self._facts.calls_per_sequence_max
        if max(per_sequence.values(), default=0) > limit:
            raise InternalError(f"more than {limit} calls of one sequence in one run")
        return await self._thread.run(lambda: self._run(calls))

    def trainer(self) -> BlockTrainer:
        """Runs training passes on the same thread."""
        return self._trainer

    async def aclose(self) -> None:
        """Leave the device thread and free the memory."""
        self._sequences.clear()
        await self._drop_adapters()
        await self._loaded_as.use.leave()
        del self._model, self._trainer, self._loaded_as, self._layers

    def _run(self, calls: Sequence[Call]) -> list[Outcome]:
        outcomes: list[Outcome] = [InternalError("not run")] * len(calls)
        parts: list[_Part] = []
        ends: dict[SequenceId, int] = {}
        for index, call in enumerate(calls):
            try:
                parts.append(self._prepared(index, call, ends.get(call.sequence)))
                ends[call.sequence] = call.position + call.count
            except ShoalError as error:
                outcomes[index] = error
                ends[call.sequence] = _BROKEN
        for one_pass in self._passes(parts):
            for part, outcome in zip(one_pass.parts, self._outcomes(one_pass), strict=True):
                outcomes[part.index] = outcome
        return outcomes

    def _prepared(self, index: int, call: Call, end: int | None) -> _Part:
        """Check a call before anything runs; `end` is where its sequence's call before ends.

        Raises:
            ShoalError: what is wrong with it.
        """
        cache = self._cache(call.sequence)
        if end == _BROKEN:
            raise _after_failure(call)
        check_call(call, cache.span, cache.length if end is None else end, self._facts)
        rows = rows_of(call, self._facts, self._device, self._model.dtype)
        by_position = False
        if self._tiles is not None:
            by_position = call.call_count <= SMALL_CALL_ROWS
            if not by_position and call.call_count > call.count:
                padding = rows.new_zeros((call.call_count - call.count, rows.shape[1]))
                rows = torch.cat([rows, padding])
        piece = Piece(
            cache=cache, start=call.position, count=rows.shape[0], by_position=by_position
        )
        adapter = self._adapters.get(call.sequence)
        return _Part(index=index, call=call, piece=piece, rows=rows, adapter=adapter)

    def _passes(self, parts: Sequence[_Part]) -> list[_Pass]:
        if self._tiles is None:
            return [_Pass(parts=_by_adapter(parts), is_tiled=False)] if parts else []
        passes: list[_Pass] = []
        tile: list[_Part] = []
        num_rows, limit = 0, self._tiles.rows_max
        for part in parts:
            is_chunk = not part.piece.by_position
            # A chunk comes after its own sequence's rows that wait in the tile.
            is_due = is_chunk and any(part.piece.cache is other.piece.cache for other in tile)
            if is_due or num_rows + part.piece.count * part.piece.by_position > limit:
                passes.append(_Pass(parts=_by_adapter(tile), is_tiled=True))
                tile, num_rows = [], 0
            if is_chunk:
                passes.append(_Pass(parts=(part,), is_tiled=False))
            else:
                tile.append(part)
                num_rows += part.piece.count
        if tile:
            passes.append(_Pass(parts=_by_adapter(tile), is_tiled=True))
        return passes

    def _outcomes(self, one_pass: _Pass) -> list[Outcome]:
        """Run one pass; where it fails as a whole, its calls one by one."""
        try:
            outputs = self._forward(one_pass)
        except Exception as error:  # noqa: BLE001  # one call's failure must not hurt the others
            if len(one_pass.parts) > 1:
                _log.warning("pass failed calls=%d; one by one", len(one_pass.parts), exc_info=True)
                alone = [
                    _Pass(parts=(part,), is_tiled=one_pass.is_tiled) for part in one_pass.parts
                ]
                return [self._outcomes(single)[0] for single in alone]
            span = one_pass.parts[0].call.span
            _log.error("call failed: span=%s", span, exc_info=True)
            return [InternalError(f"blocks {span}: {type(error).__name__}: {error}")]
        return [
            self._finished(part, output)
            for part, output in zip(one_pass.parts, outputs, strict=True)
        ]

    def _forward(self, one_pass: _Pass) -> list[torch.Tensor]:
        """Each part's rows behind its blocks; each block runs just for who wants it."""
        hidden = [part.rows for part in one_pass.parts]
        for segment in _segments(part.call.span for part in one_pass.parts):
            chosen = [
                index for index, part in enumerate(one_pass.parts) if part.call.span.covers(segment)
            ]
            sizes = [hidden[index].shape[0] for index in chosen]
            num_rows = 0
            if one_pass.is_tiled and self._tiles is not None:
                num_rows = self._tiles.padded(sum(sizes))
            parts = [one_pass.parts[index] for index in chosen]
            output = self._model.run(
                [part.piece for part in parts],
                torch.cat([hidden[index] for index in chosen]),
                segment,
                num_rows,
                _lora_runs(parts, is_tiled=one_pass.is_tiled),
            )
            for index, rows in zip(chosen, torch.split(output, sizes), strict=True):
                hidden[index] = rows
        return hidden

    def _finished(self, part: _Part, output: torch.Tensor) -> Outcome:
        """The answer to a call; only a success commits its rows to the cache."""
        call = part.call
        if part.piece.cache.length != call.position:
            return _after_failure(call)
        try:
            result = answer_to(call, output[: call.count], self._facts)
        except ShoalError as error:
            return error
        part.piece.cache.commit(call.position + call.count)
        return result


def _after_failure(call: Call) -> BadInput:
    return BadInput(f"the rows before position {call.position} failed in the same run")


def _by_adapter(parts: Iterable[_Part]) -> tuple[_Part, ...]:
    """The rows of one adapter beside each other; those of a sequence stay in order."""
    return tuple(sorted(parts, key=lambda part: part.adapter or 0))


def _lora_runs(parts: Sequence[_Part], *, is_tiled: bool) -> list[LoraRun]:
    """Which rows of a pass go through which adapter."""
    runs: list[LoraRun] = []
    at = 0
    for adapter, group in groupby(parts, key=lambda part: part.adapter):
        end = at + sum(part.rows.shape[0] for part in group)
        if adapter is not None:
            runs.append(LoraRun(adapter, at, end, is_tiled))
        at = end
    return runs


def _segments(spans: Iterable[Span]) -> list[Span]:
    """The runs of blocks between the borders of `spans` that some span covers, in order."""
    chosen = set(spans)
    borders = sorted({border for span in chosen for border in (span.start, span.end)})
    segments = [Span(start, end) for start, end in pairwise(borders)]
    return [segment for segment in segments if any(span.covers(segment) for span in chosen)]
