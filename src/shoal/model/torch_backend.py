"""Blocks on torch, one sequence at a time: correct for every family, without batching.

`load_backend` chooses between this engine and the batched one. Here, `run` takes the calls
one after the other, each in its own forward pass with its own KV cache, so company can't
change a result. One thread owns the device; the event loop only waits for it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch

from shoal.base.backend import BackendFacts, BlockBackend, Call, Outcome
from shoal.base.errors import (
    BadInput,
    ConfigError,
    InternalError,
    SessionTooLong,
    ShoalError,
)
from shoal.base.spans import Span
from shoal.model.batched_backend import CALLS_PER_SEQUENCE_MAX, BatchedBackend
from shoal.model.device_thread import DeviceThread
from shoal.model.exact import RowTiles, find_tiles
from shoal.model.families import family_of, session_tokens_max
from shoal.model.known import Progress
from shoal.model.kv_cache import PAGE_TOKENS, SequenceCache
from shoal.model.numerics import numerics_class
from shoal.model.packed_model import PackedModel
from shoal.model.quantize import Quantization, check_quantize
from shoal.model.rows import DTYPES, all_finite, encodings_for, rows_from_bytes, rows_to_bytes
from shoal.model.sequences import Sequences
from shoal.model.source import ModelSource
from shoal.model.span_model import SpanModel, load_span, num_blocks

_log = logging.getLogger(__name__)

EngineChoice = Literal["auto", "batched", "per-session"]
"""How sequences share passes. auto: batched where the architecture is known to pack."""

ExactChoice = Literal["auto", "always", "never"]
"""Whether batched rows run in tiles that keep their bits free of company.

auto: where every row count is a tile, so that it costs nothing (bfloat16, as a rule).
always: also where tiles cost padding. Where there are no tiles the backend is not exact.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendConfig:
    """How to run a span."""

    model: str
    """The model's name on the wire (`shoal.model.manifest.model_hash`)."""
    dtype: str = "float32"
    """Of weights, KV cache and computation."""
    device: str = "cpu"
    threads: int = 1
    """Compute threads; one per core that is really free."""
    cache_tokens: int = 8192
    """Positions that fit into the KV cache, over all sequences."""
    quantize: Quantization = "none"
    """Smaller weights; dtype is then that of the rest."""
    engine: EngineChoice = "auto"
    exact: ExactChoice = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.engine not in get_args(EngineChoice):
            raise ConfigError(f"engine {self.engine!r}: write {_choices(EngineChoice)}")
        if self.exact not in get_args(ExactChoice):
            raise ConfigError(f"exact {self.exact!r}: write {_choices(ExactChoice)}")
        check_quantize(self.quantize, self.device)
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        if self.cache_tokens < PAGE_TOKENS:
            raise ConfigError(f"cache_tokens must be at least {PAGE_TOKENS} (one page)")


def load_backend(
    source: ModelSource, span: Span, config: BackendConfig, progress: Progress | None = None
) -> BlockBackend:
    """Read the span's weights and start the device thread. Blocks; takes seconds.

    Raises:
        ConfigError: a span, dtype or device that cannot be.
        ModelError: the weights are broken or of an unsupported kind.
    """
    _check_device(config.device)
    thread = DeviceThread(config.threads)
    try:
        model = thread.call(
            lambda: load_span(
                source,
                span,
                dtype=config.dtype,
                device=config.device,
                quantize=config.quantize,
                progress=progress,
            )
        )
        numerics = thread.call(
            lambda: numerics_class(source.config, config.dtype, config.device, config.quantize)
        )
        if not _packs(config.engine, source.config):
            return TorchBackend(model, config, numerics, thread)
        packed = PackedModel(model)
        tiles = thread.call(lambda: _choose_tiles(packed, config))
    except BaseException:
        thread.stop()
        raise
    numerics = _batched_numerics(numerics, tiles)
    facts = replace(
        _facts(model, config, numerics, is_exact=tiles is not None),
        calls_per_sequence_max=CALLS_PER_SEQUENCE_MAX,
    )
    return BatchedBackend(packed, facts, tiles, config.device, thread)


def _packs(engine: EngineChoice, model_config: Any) -> bool:
    """Whether to batch.

    Raises:
        ConfigError: batching was asked of an architecture that can't.
    """
    if engine == "batched" and not family_of(model_config).packs:
        raise ConfigError(
            f"architecture {model_config.model_type!r} cannot be batched: leave engine on auto"
        )
    return engine != "per-session" and family_of(model_config).packs


def _choose_tiles(model: PackedModel, config: BackendConfig) -> RowTiles | None:
    if config.exact == "never":
        return None
    tiles = find_tiles(model, config.device)
    if tiles is None or (config.exact == "auto" and not tiles.is_free):
        model.experts.reset()
        return None
    return tiles


def _batched_numerics(numerics: str, tiles: RowTiles | None) -> str:
    """The class of the batched engine: its tiles are part of what gives equal bits."""
    dtype = numerics.partition("-")[0]
    said = f"{numerics} batched {(tiles.counts, tiles.probe) if tiles else 'packed'}"
    digest = hashlib.blake2b(said.encode(), digest_size=8, person=b"shoal-numerics")
    return f"{dtype}-{digest.hexdigest()}"


def _facts(
    model: SpanModel, config: BackendConfig, numerics: str, *, is_exact: bool
) -> BackendFacts:
    return BackendFacts(
        model=config.model,
        span=model.span,
        num_blocks=num_blocks(model.config),
        hidden_size=int(model.config.hidden_size),
        encodings=encodings_for(config.dtype),
        numerics=numerics,
        is_exact=is_exact,
        cache_tokens=config.cache_tokens,
        page_tokens=PAGE_TOKENS,
        session_tokens_max=session_tokens_max(model.config),
    )


def _choices(kind: Any) -> str:
    return ", ".join(get_args(kind))


class TorchBackend(Sequences[SequenceCache]):
    """`shoal.base.backend.BlockBackend` over transformers' own cache. Made by `load_backend`."""

    def __init__(
        self, model: SpanModel, config: BackendConfig, numerics: str, thread: DeviceThread
    ) -> None:
        new_cache = partial(SequenceCache, model.windows, recurrent=model.recurrent)
        super().__init__(model.span, new_cache, SequenceCache.forked)
        self._model = model
        self._device = config.device
        self._thread = thread
        self._facts = _facts(model, config, numerics, is_exact=False)

    @property
    def facts(self) -> BackendFacts:
        """What this backend is."""
        return self._facts

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run the calls on the device thread, one by one; one outcome each, in order."""
        sequences = {call.sequence for call in calls}
        if len(sequences) != len(calls):
            raise InternalError("two calls of one sequence in one run")
        return await self._thread.run(lambda: [self._outcome(call) for call in calls])

    async def aclose(self) -> None:
        """Stop the device thread and free the memory."""
        await self._thread.aclose()
        self._sequences.clear()
        del self._model

    def _outcome(self, call: Call) -> Outcome:
        """Run one call; only a success commits its rows to the cache."""
        try:
            return self._run_one(call)
        except ShoalError as error:
            return error
        except Exception as error:  # noqa: BLE001  # one call's failure must not hurt the others
            _log.error("call failed: sequence=%s span=%s", call.sequence, call.span, exc_info=True)
            return InternalError(f"blocks {call.span}: {type(error).__name__}: {error}")

    def _run_one(self, call: Call) -> bytes:
        cache = self._cache(call.sequence)
        self._check(call, cache)
        payload_rows = rows_from_bytes(
            call.payload, call.encoding, call.count, self._facts.hidden_size
        )
        rows = payload_rows.to(device=self._device, dtype=self._model.dtype)
        if not all_finite(rows):
            raise BadInput(f"rows {call.position} to {_last(call)} hold values that are not finite")
        output = self._model.forward(rows, call.position, cache, call.span)
        if not all_finite(output):
            raise BadInput(
                f"blocks {call.span} gave values that are not finite from rows {call.position} "
                f"to {_last(call)} (too large for {self._facts.encodings[0]}?)"
            )
        result = b""
        if call.rows_wanted:
            result = rows_to_bytes(output[call.count - call.rows_wanted :], call.output_encoding)
        cache.commit(call.count)
        return result

    def _check(self, call: Call, cache: SequenceCache) -> None:
        if call.span != cache.span:
            raise BadInput(f"blocks {call.span} of a sequence that was opened over {cache.span}")
        if call.position != cache.length:
            raise BadInput(f"position {call.position} after {cache.length} cached rows")
        if not 0 <= call.rows_wanted <= call.count:
            raise BadInput(f"{call.rows_wanted} rows wanted of {call.count}")
        if call.output_encoding not in self._facts.encodings:
            raise BadInput(f"unknown encoding {call.output_encoding!r}")
        limit = self._facts.session_tokens_max
        if call.position + call.count > limit:
            raise SessionTooLong(f"the model ends at {limit} positions")


def _last(call: Call) -> int:
    return call.position + call.count - 1


def _check_device(device: str) -> None:
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: write cpu or cuda:0") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no CUDA device here (use cpu)")
