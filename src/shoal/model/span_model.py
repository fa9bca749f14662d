"""The blocks of a span, cut out of transformers' own model object.

The whole model is built on the meta device (shapes, no memory), the span's blocks are
filled with weights, everything else passes hidden states through: blocks outside the span,
the final norm, the embeddings. transformers' forward then runs unchanged, with its own
masks, rotary tables and attention, and block numbers stay global. A probe at the end proves
that a model with all blocks passed through returns its input bit by bit: architectures that
do more between blocks fail here, loudly.
Shapes: S new tokens, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache

from shoal.base.errors import ConfigError, ModelUnsupported
from shoal.base.spans import Span
from shoal.model.checkpoint import Checkpoint
from shoal.model.families import num_blocks, recurrent_blocks, session_tokens_max
from shoal.model.known import Progress
from shoal.model.kv_cache import SequenceCache, block_windows
from shoal.model.parts import Parts, check_nothing_on_meta, fill_tables, meta_model
from shoal.model.quantize import Quantization, quantized_bytes, quantizer
from shoal.model.rows import torch_dtype
from shoal.model.source import ModelSource

__all__ = ["SpanModel", "bytes_per_block", "load_span", "meta_model", "num_blocks"]


class SpanModel:
    """The blocks [start, end) of a model, ready to run. Use from one thread."""

    def __init__(self, parts: Parts, blocks: Mapping[int, torch.nn.Module], span: Span) -> None:
        self.config = parts.whole.config
        self.span = span
        self.windows = block_windows(self.config)
        self._position_max = session_tokens_max(self.config) - 1
        self.recurrent = recurrent_blocks(self.config)
        self.dtype: torch.dtype = parts.whole.dtype
        self.base = parts.core
        self._blocks = dict(blocks)
        self._outside = parts.pass_through(set())
        self._stacks: dict[Span, tuple[Callable[..., Any], ...]] = {}
        self._blocks_attribute = parts.family.blocks
        names = inspect.signature(self.base.forward).parameters
        self._cache_argument = "past_key_values" if "past_key_values" in names else "cache_params"
        # A tuple in place of the ModuleList: transformers slices it on every call, and
        # slicing a ModuleList rebuilds it.
        delattr(self.base, self._blocks_attribute)

    def new_cache(self, span: Span) -> SequenceCache:
        """An empty cache for a sequence over `span`."""
        return SequenceCache(self.windows, span, recurrent=self.recurrent)

    def parameters(self) -> list[torch.Tensor]:
        """The weights that are held."""
        return [weight for block in self._blocks.values() for weight in block.parameters()]

    def block(self, index: int) -> torch.nn.Module:
        """One of the span's blocks."""
        return self._blocks[index]

    def blocks(self) -> list[torch.nn.Module]:
        """All of the span's blocks."""
        return list(self._blocks.values())

    def forward(
        self, hidden: torch.Tensor, position: int, cache: SequenceCache, span: Span
    ) -> torch.Tensor:
        """(S, D) hidden states after the blocks of `span`; keys and values go to `cache`.

        Nothing is committed to the cache.
        """
        cache.begin()
        positions = torch.arange(position, position + hidden.shape[0], device=hidden.device)
        return self.forward_at(hidden, positions, cache, span)

    def forward_cut(
        self, hidden: torch.Tensor, call_count: int, position: int, cache: SequenceCache, span: Span
    ) -> torch.Tensor:
        """`forward` of the first rows of a call that had `call_count`, with that call's bits.

        The rows that are missing become zeros. No row sees those behind it, but the number
        of rows chooses the kernels, and so the bits. Recurrent blocks run once more, with
        the given rows alone, to get their state.
        """
        count = hidden.shape[0]
        rows = functional.pad(hidden, (0, 0, 0, call_count - count))
        positions = torch.arange(position, position + call_count, device=hidden.device)
        cache.begin()
        if not any(block in self.recurrent for block in range(span.start, span.end)):
            return self.forward_at(rows, positions, cache, span)[:count]
        for block in range(span.start, span.end):
            one = Span(block, block + 1)
            output = self.forward_at(rows, positions, cache, one)
            if block in self.recurrent:
                cache.rewind(block)
                self.forward_at(rows[:count], positions[:count], cache, one)
            rows = output
        return rows[:count]

    def forward_at(
        self, hidden: torch.Tensor, positions: torch.Tensor, cache: Cache, span: Span
    ) -> torch.Tensor:
        """The same with a position (S,) for each row: rows of several sequences in one pass."""
        setattr(self.base, self._blocks_attribute, self._stack(span))
        output = self.base(
            inputs_embeds=hidden.unsqueeze(0),
            # Some rotary tables change beyond a length. Sessions end before it, but not the
            # padding of calls that are repeated in their first shape.
            position_ids=positions.clamp(max=self._position_max).unsqueeze(0),
            use_cache=True,
            **{self._cache_argument: cache},
        )
        rows: torch.Tensor = output.last_hidden_state[0]
        return rows

    def forward_whole(self, hidden: torch.Tensor, span: Span) -> torch.Tensor:
        """(B, S, D) of whole sequences behind the blocks of `span`; differentiable, no cache."""
        setattr(self.base, self._blocks_attribute, self._stack(span))
        output = self.base(inputs_embeds=hidden, use_cache=False)
        rows: torch.Tensor = output.last_hidden_state
        return rows

    def block_kinds(self) -> list[int]:
        """The first block of each kind, in an order that spans have in common."""
        return [block for _, block in sorted(self.kinds().items())]

    def kinds(self) -> dict[str, int]:
        """By kind its first block: equal shapes and windows are one kind."""
        kinds: dict[str, int] = {}
        for index, block in self._blocks.items():
            shapes = [(name, tuple(weight.shape)) for name, weight in block.named_parameters()]
            # Layers that keep their weights in a form of their own.
            shapes += [
                (name, (module.in_features, module.out_features))
                for name, module in block.named_modules()
                if hasattr(module, "in_features")
            ]
            kinds.setdefault(repr((shapes, self.windows[index])), index)
        return kinds

    def _stack(self, span: Span) -> tuple[Callable[..., Any], ...]:
        stack = self._stacks.get(span)
        if stack is None:
            stack = tuple(
                self._blocks[index] if index in span else self._outside[index]
                for index in range(num_blocks(self.config))
            )
            self._stacks[span] = stack
        return stack


def load_span(
    source: ModelSource,
    span: Span,
    *,
    dtype: str,
    device: str = "cpu",
    quantize: Quantization = "none",
    progress: Progress | None = None,
    held: Mapping[int, torch.nn.Module] | None = None,
) -> SpanModel:
    """Build `span` of `source`, reading only the span's tensors.

    `held`: blocks of the same source, dtype and quantisation that are loaded already, by
    number. They are taken as they are, and may serve elsewhere as well.

    Raises:
        ConfigError: a span that the model doesn't have, or an unknown dtype.
        ModelCorrupt: a tensor is missing or has a wrong shape.
        ModelUnsupported: an architecture that can't be cut.
    """
    _check_span(source, span)
    whole = meta_model(source.config, torch_dtype(dtype))
    parts = Parts(whole)
    checkpoint = Checkpoint(whole, source)
    blocks: dict[int, torch.nn.Module] = {}
    for done, index in enumerate(range(span.start, span.end)):
        if held is not None and index in held:
            blocks[index] = held[index]
            continue
        block = parts.blocks[index]
        smaller = quantizer(block, quantize, device)
        checkpoint.fill(block, f"{parts.blocks_name}.{index}.", device, smaller)
        fill_tables(whole, block, device)
        check_nothing_on_meta(block)
        blocks[index] = block
        if progress is not None:
            progress("loading blocks", done + 1, len(span))
    parts.neutralise_ends()
    model = SpanModel(parts, blocks, span)
    fill_tables(whole, model.base, device)
    check_nothing_on_meta(model.base)
    probe_pass_through(model, device)
    return model


def span_tensor_names(source: ModelSource, span: Span) -> list[str]:
    """The source's tensors that a server of `span` reads, and so the ones it must hash.

    Raises:
        ConfigError: a span that the model doesn't have.
        ModelUnsupported: an architecture that can't be cut.
    """
    _check_span(source, span)
    whole = meta_model(source.config, torch.float32)
    prefix = Parts(whole).blocks_name
    checkpoint = Checkpoint(whole, source)
    return [
        name
        for index in range(span.start, span.end)
        for name in checkpoint.stored_names(f"{prefix}.{index}.")
    ]


def bytes_per_block(source: ModelSource, dtype: str, quantize: Quantization = "none") -> int:
    """Memory of the weights of the largest block in `dtype`, quantised or not."""
    return max(block_bytes(source.config, dtype, quantize))


def block_bytes(config: Any, dtype: str, quantize: Quantization = "none") -> list[int]:
    """Memory of the weights of each block in `dtype`, quantised or not."""
    blocks = Parts(meta_model(config, torch_dtype(dtype))).blocks
    return [quantized_bytes(block, quantize) for block in blocks]


def probe_pass_through(model: SpanModel, device: str) -> None:
    """Prove that nothing but blocks touches hidden states.

    Raises:
        ModelUnsupported: the architecture does more on the way in or out.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, model.config.hidden_size, generator=generator)
    rows = rows.to(device=device, dtype=model.dtype)
    empty = Span(model.span.start, model.span.start)
    try:
        with torch.inference_mode():
            output = model.forward(rows, 0, model.new_cache(empty), empty)
    except (TypeError, AttributeError, ValueError, RuntimeError, KeyError, IndexError) as error:
        raise ModelUnsupported(
            f"architecture {model.config.model_type!r} does not run from hidden states: {error}"
        ) from error
    if not torch.equal(output, rows):
        raise ModelUnsupported(
            f"architecture {model.config.model_type!r} changes hidden states outside its "
            "blocks: it cannot be cut at block borders"
        )


def _check_span(source: ModelSource, span: Span) -> None:
    count = num_blocks(source.config)
    if not len(span) or span.end > count:
        raise ConfigError(f"blocks {span} of a model with blocks [0,{count})")
