"""Blocks on torch, one sequence at a time: correct for every family, without batching.

`load_backend` chooses between this engine and the batched one. Here, `run` takes the calls
one after the other, each in its own forward pass with its own KV cache, so company can't
change a result. One thread owns the device; the event loop only waits for it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch

from shoal.base.backend import BackendFacts, BlockBackend, Call, Outcome
from shoal.base.errors import ConfigError, InternalError, ShoalError
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer
from shoal.model.adapter_sequences import AdaptedSequences
from shoal.model.batched_backend import CALLS_PER_SEQUENCE_MAX, BatchedBackend
from shoal.model.calls import answer_to, check_call, rows_of
from shoal.model.device_thread import DeviceThread
from shoal.model.exact import RowTiles, find_tiles
from shoal.model.exact_alone import probe_alone
from shoal.model.families import family_of, session_tokens_max
from shoal.model.known import Progress
from shoal.model.kv_cache import PAGE_TOKENS, SequenceCache
from shoal.model.lora_pass import LoraRun, lora_running
from shoal.model.lora_rows import LoraLayers
from shoal.model.numerics import numerics_class
from shoal.model.packed_model import PackedModel
from shoal.model.quantize import Quantization, check_quantize
from shoal.model.rows import DTYPES, encodings_for
from shoal.model.sharing import Loaded, ThreadUse
from shoal.model.source import ModelSource
from shoal.model.span_model import SpanModel, load_span, num_blocks
from shoal.model.tiled_experts import TiledExperts
from shoal.model.training import AloneRunner, TorchTrainer

_log = logging.getLogger(__name__)

T = TypeVar("T")

EngineChoice = Literal["auto", "batched", "per-session"]
"""How sequences share passes. auto: batched where the architecture is known to pack."""

ExactChoice = Literal["auto", "always", "never"]
"""Whether rows keep their bits in any company and when they are repeated.

auto: where it costs nothing: without experts, and where one row becomes two at worst.
always: also with experts, and where tiles cost padding. Where there are no tiles the
backend is not exact.
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
        exact_choice(self.exact)
        check_quantize(self.quantize, self.device)
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        if self.cache_tokens < PAGE_TOKENS:
            raise ConfigError(f"cache_tokens must be at least {PAGE_TOKENS} (one page)")


def exact_choice(name: str) -> ExactChoice:
    """The choice called `name`.

    Raises:
        ConfigError: there is none.
    """
    choices: tuple[ExactChoice, ...] = get_args(ExactChoice)
    for choice in choices:
        if name == choice:
            return choice
    raise ConfigError(f"exact {name!r}: write {_choices(ExactChoice)}")


def load_backend(
    source: ModelSource,
    span: Span,
    config: BackendConfig,
    progress: Progress | None = None,
    beside: BlockBackend | None = None,
) -> BlockBackend:
    """Read the span's weights and start the device thread. Blocks; takes seconds.

    `beside`: what serves now, from the same source. Blocks that it has are not read again, if
    it was loaded alike; both then run on one thread. It stays open until this returns.

    Raises:
        ConfigError: a span, dtype or device that cannot be.
        ModelError: the weights are broken or of an unsupported kind.
    """
    _check_device(config.device)
    lender = beside.loaded if isinstance(beside, TorchBackend | BatchedBackend) else None
    held = {} if lender is None else lender.shared(config, span)
    thread = DeviceThread(config.threads)
    is_kept = False
    try:
        model = thread.call(
            lambda: load_span(
                source,
                span,
                dtype=config.dtype,
                device=config.device,
                quantize=config.quantize,
                progress=progress,
                held=held,
            )
        )
        numerics = thread.call(
            lambda: numerics_class(source.config, config.dtype, config.device, config.quantize)
        )
        if lender is None or not held:
            backend = _backend(model, config, numerics, ThreadUse(thread), None)
            is_kept = True
            return backend
        return _backend(model, config, numerics, lender.use, lender)
    finally:
        if not is_kept:
            thread.stop()


def _backend(
    model: SpanModel, config: BackendConfig, numerics: str, use: ThreadUse, lender: Loaded | None
) -> BlockBackend:
    """The engine for a model whose weights are there; `lender` has some of its blocks as well."""

    def probed(find: Callable[[], T]) -> T:
        return use.thread.call(find) if lender is None else lender.probe(model, find)

    def loaded(found: object) -> Loaded:
        return Loaded(config, model, found, use if lender is None else use.join())

    if not _packs(config.engine, model.config):
        probe = probed(lambda: _probe_alone(model, config))
        numerics = _numerics_with(numerics, f"alone {probe}") if probe else numerics
        facts = _facts(model, config, numerics, is_exact=probe is not None)
        return TorchBackend(facts, config.device, loaded(probe))
    packed = PackedModel(model)
    tiles = probed(lambda: _choose_tiles(packed, config))
    said = (tiles.counts, tiles.probe) if tiles else "packed"
    numerics = _numerics_with(numerics, f"batched {packed.kernels} {said}")
    facts = replace(
        _facts(model, config, numerics, is_exact=tiles is not None),
        calls_per_sequence_max=CALLS_PER_SEQUENCE_MAX,
    )
    return BatchedBackend(packed, facts, tiles, config.device, loaded(tiles))


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
    is_free = tiles is not None and tiles.is_free and model.experts.is_free
    if config.exact == "auto" and not is_free:
        model.experts.reset()
        return None
    return tiles


def _probe_alone(model: SpanModel, config: BackendConfig) -> str | None:
    if config.exact == "never":
        return None
    experts = TiledExperts(model.base.config, model.blocks())
    probe = probe_alone(model, experts, config.device)
    if config.exact == "auto" and not experts.is_free:
        experts.reset()
        return None
    return probe


def _numerics_with(numerics: str, engine: str) -> str:
    """The class of an engine: its tiles and probes are part of what gives equal bits."""
    dtype = numerics.partition("-")[0]
    said = f"{numerics} {engine}"
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


class TorchBackend(AdaptedSequences[SequenceCache]):
    """`shoal.base.backend.BlockBackend` over transformers' own cache. Made by `load_backend`."""

    def __init__(self, facts: BackendFacts, device: str, loaded: Loaded) -> None:
        model, thread = loaded.model, loaded.use.thread
        new_cache = partial(SequenceCache, model.windows, recurrent=model.recurrent)
        layers = LoraLayers(
            model.span,
            lambda block: dict(model.block(block).named_modules()),
            device,
            is_exact=False,  # each call has its own pass, of a shape that is repeated
        )
        super().__init__(model.span, new_cache, SequenceCache.forked, layers, thread)
        self._model = model
        self._device = device
        self._thread = thread
        self._loaded_as = loaded
        self._facts = facts
        runner = AloneRunner(model)
        self._trainer = TorchTrainer(
            model, lambda: self._facts, device, thread, runner=runner, is_packed=False
        )

    @property
    def facts(self) -> BackendFacts:
        """What this backend is."""
        return self._facts

    @property
    def loaded(self) -> Loaded:
        """What another backend may take over."""
        return self._loaded_as

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run the calls on the device thread, one by one; one outcome each, in order."""
        sequences = {call.sequence for call in calls}
        if len(sequences) != len(calls):
            raise InternalError("two calls of one sequence in one run")
        return await self._thread.run(lambda: [self._outcome(call) for call in calls])

    def trainer(self) -> BlockTrainer:
        """Runs training passes on the same thread."""
        return self._trainer

    async def aclose(self) -> None:
        """Leave the device thread and free the memory."""
        self._sequences.clear()
        await self._drop_adapters()
        await self._loaded_as.use.leave()
        del self._model, self._trainer, self._loaded_as, self._layers

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
        check_call(call, cache.span, cache.length, self._facts)
        rows = rows_of(call, self._facts, self._device, self._model.dtype)
        adapter = self._adapters.get(call.sequence)
        runs = [] if adapter is None else [LoraRun(adapter, 0, None, is_tiled=False)]
        with lora_running(runs):
            if self._facts.is_exact and call.count < call.call_count:
                output = self._model.forward_cut(
                    rows, call.call_count, call.position, cache, call.span
                )
            else:
                output = self._model.forward(rows, call.position, cache, call.span)
        result = answer_to(call, output, self._facts)
        cache.commit(call.count)
        return result


def _check_device(device: str) -> None:
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: write cpu or cuda:0") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r}: torch sees no CUDA device here (use cpu)")
