"""[model] of cluster.toml: a model on this machine, or plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.base.errors import ConfigError, ShoalError
from shoal.cli.plan_reader import Table
from shoal.plan.memory import CacheShape
from shoal.plan.spec import ModelSpec

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BITS: Final = {"none": 0.0, "int8": 8.25, "int4": 5.0}
"""Bits per weight with scales and offsets, as our own quantisation keeps them."""

PAGE_TOKENS: Final = 32
"""Positions per page of the cache, as the engine counts them."""

BLOCKS_MAX: Final = 4096
"""Blocks that a file may describe: no model comes near."""

NUMBERS: Final = ("blocks", "params_per_block", "block_size", "hidden_size", "kv_heads")
"""Keys that only a model of plain numbers has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model's sizes, and how to name it to `shoal serve`."""

    given: str | None
    """None: it was described by numbers alone."""
    spec: ModelSpec
    params_per_block: float
    dtype: str
    quantize: str
    active: float
    """Share of a block's weights that one row uses (mixtures of experts)."""


def read_model(table: Table, folder: Path) -> PlannedModel:
    """The model of a file that lies in `folder`.

    Raises:
        ConfigError: nonsense, with its line.
        ModelError: the named model can't be opened, and why.
    """
    dtype = table.choice("dtype", list(DTYPE_BYTES), "float32")
    quantize = table.choice("quantize", list(QUANTIZED_BITS), "none")
    active = table.number("active", 1.0, low=1e-3, high=1.0)
    if "name" not in table:
        if not any(key in table for key in NUMBERS):
            raise table.fail(
                "no model: give its name (a directory, a .gguf file, a known name or a hub id), or "
                "numbers (blocks, params_per_block or block_size, hidden_size, kv_heads, head_size)"
            )
        return _from_numbers(table, dtype, quantize, active)
    for key in NUMBERS:
        if key in table:
            raise table.fail("is for a model without a name: leave one of them out", key)
    given = table.text("name")
    table.done()
    near = folder / given
    return named_model(
        str(near) if near.exists() else given, dtype, quantize, active, error_at=table
    )


def named_model(
    given: str,
    dtype: str,
    quantize: str,
    active: float = 1.0,
    *,
    error_at: Table | None = None,
) -> PlannedModel:
    """The sizes of a model that this machine can open; weights are not read.

    Raises:
        ConfigError, ModelError: it can't be opened or described; `error_at` adds the line.
    """
    try:
        config = _config(given)
        from shoal.model.block_rows import ROLLBACK_TOKENS
        from shoal.model.facts import kv_values
        from shoal.model.kv_cache import block_windows
        from shoal.model.quantize import quantization
        from shoal.model.span_model import block_bytes

        weights = block_bytes(config, dtype, quantization(quantize))
        params = sum(block_bytes(config, "float32")) / 4 / len(weights)
        windows = block_windows(config)
        values = [kv_values(config, block) for block in range(len(weights))]
    except ShoalError as error:
        if error_at is None:
            raise
        raise type(error)(error_at.checked("name", error).detail) from error
    caches = (
        CacheShape(
            values_per_token=count,
            value_bytes=DTYPE_BYTES[dtype],
            window=window,
            margin_tokens=ROLLBACK_TOKENS,
        )
        for count, window in zip(values, windows, strict=True)
    )
    hidden_size = int(config.hidden_size)
    return PlannedModel(
        given=given,
        spec=ModelSpec(
            hidden_size=hidden_size,
            weight_bytes=tuple(weights),
            caches=tuple(caches),
            row_bytes=hidden_size * DTYPE_BYTES[dtype],
            page_tokens=PAGE_TOKENS,
        ),
        params_per_block=params,
        dtype=dtype,
        quantize=quantize,
        active=active,
    )


def _config(given: str) -> Any:
    """Of a directory a config alone will do: the weights may be elsewhere, or yet to come."""
    from shoal.cli.models import open_outline, quiet_transformers

    if not Path(given).is_dir():
        return open_outline(given).config
    quiet_transformers()
    from shoal.model.safetensors_source import SavedOutline

    return SavedOutline(Path(given)).config


def _from_numbers(table: Table, dtype: str, quantize: str, active: float) -> PlannedModel:
    blocks = table.integer("blocks", high=BLOCKS_MAX)
    hidden_size = table.integer("hidden_size", high=1 << 20)
    bits = QUANTIZED_BITS[quantize] or 8.0 * DTYPE_BYTES[dtype]
    if ("params_per_block" in table) == ("block_size" in table):
        raise table.fail("give one of params_per_block and block_size")
    if "params_per_block" in table:
        params = table.positive("params_per_block")
        weights = max(1, round(params * bits / 8))
        table.asked.add("block_size")
    else:
        weights = table.size("block_size")
        params = weights * 8 / bits
        table.asked.add("params_per_block")
    cache = _cache(table, dtype)
    table.asked.add("name")
    table.done()
    return PlannedModel(
        given=None,
        spec=ModelSpec(
            hidden_size=hidden_size,
            weight_bytes=(weights,) * blocks,
            caches=(cache,) * blocks,
            row_bytes=hidden_size * DTYPE_BYTES[dtype],
            page_tokens=PAGE_TOKENS,
        ),
        params_per_block=params,
        dtype=dtype,
        quantize=quantize,
        active=active,
    )


def _cache(table: Table, dtype: str) -> CacheShape:
    """From kv_heads and head_size, or kv_values (latent attention), and a window."""
    window = table.integer("window", high=1 << 24) if "window" in table else None
    table.asked.add("window")
    if "kv_values" in table:
        values = table.integer("kv_values", high=1 << 24)
        for key in ("kv_heads", "head_size"):
            if key in table:
                raise table.fail("goes without kv_values", key)
    else:
        values = 2 * table.integer("kv_heads", high=1 << 16)
        values *= table.integer("head_size", high=1 << 16)
    table.asked.update(("kv_values", "kv_heads", "head_size"))
    try:
        return CacheShape(values_per_token=values, value_bytes=DTYPE_BYTES[dtype], window=window)
    except ConfigError as error:
        raise table.fail(error.detail) from error
