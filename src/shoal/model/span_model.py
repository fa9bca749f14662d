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

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from shoal.base.errors import ConfigError, ModelCorrupt, ModelUnsupported
from shoal.base.spans import Span
from shoal.model.families import family_of
from shoal.model.known import Progress
from shoal.model.kv_cache import SequenceCache, block_windows
from shoal.model.rows import torch_dtype
from shoal.model.source import ModelSource


def num_blocks(config: Any) -> int:
    """Blocks of the whole model."""
    return int(config.num_hidden_layers)


class SpanModel:
    """The blocks [start, end) of a model, ready to run. Use from one thread."""

    def __init__(self, model: Any, blocks: Mapping[int, torch.nn.Module], span: Span) -> None:
        self.config = model.config
        self.span = span
        self.windows = block_windows(model.config)
        self.dtype: torch.dtype = model.dtype
        self.base = model
        self._blocks = dict(blocks)
        self._stacks: dict[Span, tuple[Callable[..., torch.Tensor], ...]] = {}
        self._blocks_attribute = family_of(model.config).blocks
        # A tuple in place of the ModuleList: transformers slices it on every call, and
        # slicing a ModuleList rebuilds it.
        delattr(model, self._blocks_attribute)

    def parameters(self) -> list[torch.Tensor]:
        """The weights that are held."""
        return [weight for block in self._blocks.values() for weight in block.parameters()]

    def forward(
        self, hidden: torch.Tensor, position: int, cache: SequenceCache, span: Span
    ) -> torch.Tensor:
        """(S, D) hidden states after the blocks of `span`; keys and values go to `cache`.

        Nothing is committed to the cache.
        """
        positions = torch.arange(position, position + hidden.shape[0], device=hidden.device)
        return self.forward_at(hidden, positions, cache, span)

    def forward_at(
        self, hidden: torch.Tensor, positions: torch.Tensor, cache: Cache, span: Span
    ) -> torch.Tensor:
        """The same with a position (S,) for each row: rows of several sequences in one pass."""
        setattr(self.base, self._blocks_attribute, self._stack(span))
        output = self.base(
            inputs_embeds=hidden.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
        )
        rows: torch.Tensor = output.last_hidden_state[0]
        return rows

    def _stack(self, span: Span) -> tuple[Callable[..., torch.Tensor], ...]:
        stack = self._stacks.get(span)
        if stack is None:
            stack = tuple(
                self._blocks[index] if index in span else _pass_through
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
    progress: Progress | None = None,
) -> SpanModel:
    """Build `span` of `source`, reading only the span's tensors.

    Raises:
        ConfigError: a span that the model doesn't have, or an unknown dtype.
        ModelCorrupt: a tensor is missing or has a wrong shape.
        ModelUnsupported: an architecture that can't be cut.
    """
    config = source.config
    if not len(span) or span.end > num_blocks(config):
        raise ConfigError(f"blocks {span} of a model with blocks [0,{num_blocks(config)})")
    whole = meta_model(config, torch_dtype(dtype))
    base = whole.base_model
    prefix = f"{whole.base_model_prefix}."
    family = family_of(config)
    all_blocks = getattr(base, family.blocks)
    blocks: dict[int, torch.nn.Module] = {}
    for done, index in enumerate(range(span.start, span.end)):
        block = all_blocks[index]
        fill(block, source, f"{prefix}{family.blocks}.{index}.", torch_dtype(dtype), device)
        blocks[index] = block
        if progress is not None:
            progress("loading blocks", done + 1, len(span))
    setattr(base, family.norm, torch.nn.Identity())
    setattr(base, family.embedding, torch.nn.Identity())
    _rebuild_tables(base, config, device)
    model = SpanModel(base, blocks, span)
    _check_nothing_on_meta(base, blocks.values())
    probe_pass_through(model, device)
    return model


def meta_model(config: Any, dtype: torch.dtype) -> Any:
    """transformers' causal language model for `config`, without memory, in eval mode."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def fill(
    module: torch.nn.Module, source: ModelSource, prefix: str, dtype: torch.dtype, device: str
) -> None:
    """Give a meta module its weights: the tensors of `source` called `prefix` + own name.

    Raises:
        ModelCorrupt: a tensor is missing or has a wrong shape.
    """
    known = set(source.tensor_names())
    tensors: dict[str, torch.Tensor] = {}
    for name, expected in module.state_dict().items():
        full_name = prefix + name
        if full_name not in known:
            raise ModelCorrupt(f"the model's files lack the tensor {full_name}")
        tensor = source.read(full_name)
        if tensor.shape != expected.shape:
            raise ModelCorrupt(
                f"{full_name} has shape {tuple(tensor.shape)}, the config says "
                f"{tuple(expected.shape)}"
            )
        # A copy of our own: mapped files may change or vanish under us, and are unaligned.
        tensors[name] = tensor.detach().to(device=device, dtype=dtype, copy=True)
    module.load_state_dict(tensors, strict=True, assign=True)
    module.requires_grad_(False)


def bytes_per_block(source: ModelSource, dtype: str) -> int:
    """Memory of the weights of the largest block in `dtype`."""
    whole = meta_model(source.config, torch_dtype(dtype))
    blocks = getattr(whole.base_model, family_of(source.config).blocks)
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks]
    return int(max(sizes))


def probe_pass_through(model: SpanModel, device: str) -> None:
    """Prove that nothing but blocks touches hidden states.

    Raises:
        ModelUnsupported: the architecture does more on the way in or out.
    """
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(3, model.config.hidden_size, generator=generator)
    rows = rows.to(device=device, dtype=model.dtype)
    empty = Span(model.span.start, model.span.start)
    with torch.inference_mode():
        cache = SequenceCache(model.windows, empty)
        output = model.forward(rows, 0, cache, empty)
    if not torch.equal(output, rows):
        raise ModelUnsupported(
            f"architecture {model.config.model_type!r} changes hidden states outside its "
            "blocks: it cannot be cut at block borders"
        )


def _pass_through(hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    return hidden_states


def _rebuild_tables(base: Any, config: Any, device: str) -> None:
    """Compute tables that are not weights (rotary frequencies), which meta left empty."""
    for name, child in list(base.named_children()):
        buffers = list(child.named_buffers())
        if buffers and all(buffer.is_meta for _, buffer in buffers) and not _has_parameters(child):
            try:
                rebuilt = type(child)(config=config)
            except TypeError as error:
                raise ModelUnsupported(f"cannot rebuild the table {name!r}: {error}") from error
            setattr(base, name, rebuilt.to(device).eval())


def _has_parameters(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _check_nothing_on_meta(base: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> None:
    for module in (base, *blocks):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_meta:
                raise ModelUnsupported(f"{name} was left without values after loading")
