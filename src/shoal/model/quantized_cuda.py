"""Quantised linear layers on CUDA devices, by bitsandbytes.

Written to bitsandbytes' documentation; it has not been run on a device yet.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from shoal.base.errors import ConfigError

INT8_THRESHOLD = 6.0
"""Inputs beyond this are multiplied in 16 bits (the LLM.int8 paper's choice)."""


def require_bitsandbytes() -> Any:
    """The module.

    Raises:
        ConfigError: it isn't installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            "quantised weights on CUDA need bitsandbytes: pip install 'shoal[bitsandbytes]'"
        ) from error


def cuda_linear(linear: torch.nn.Linear, quantize: str, device: str) -> torch.nn.Module:
    """The layer with int8 (LLM.int8) or 4-bit (NF4) weights on `device`."""
    library = require_bitsandbytes()
    has_bias = linear.bias is not None
    weight = linear.weight.detach().to("cpu")
    shape = (linear.in_features, linear.out_features, has_bias)
    quantized: torch.nn.Module
    if quantize == "int8":
        quantized = library.nn.Linear8bitLt(
            *shape, has_fp16_weights=False, threshold=INT8_THRESHOLD
        )
        quantized.weight = library.nn.Int8Params(
            weight, requires_grad=False, has_fp16_weights=False
        )
    else:
        quantized = library.nn.Linear4bit(
            *shape, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        quantized.weight = library.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", module=quantized
        )
    if has_bias:
        quantized.bias = torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
    # Moving to the device is what quantises.
    return quantized.to(device).requires_grad_(False)
