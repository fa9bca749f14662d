"""Numerics classes: which machines give equal bits.

The class of a server is its dtype and a hash over a seeded computation at the model's own
shapes, in this process, with its libraries and threads. It doesn't depend on the span, so
servers of different spans can be compared. Equal classes are strong evidence of equal
bits, not proof: the probe has fewer shapes than the model.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import torch
import transformers
from torch.nn import functional

from shoal.model.quantize import Quantization, quantized_linear
from shoal.model.rows import torch_dtype

_ROW_COUNTS: Final = (1, 5, 40)
"""Decode, a small chunk, a larger chunk: kernels are chosen by the number of rows."""

_QUANTIZED_ROW_COUNTS: Final = (1, 5, 40, 100)
"""Quantised layers have two ways to multiply; 100 rows take the other one with int4 too."""

_WIDTH_MAX: Final = 2048
"""Wider matrices are cut to this in the probe: 34 MB, some 10 ms."""

_KV_TOKENS: Final = 70


def numerics_class(config: Any, dtype: str, device: str, quantize: Quantization = "none") -> str:
    """For example `bfloat16-5f0c1a2b3c4d5e6f`, or `bfloat16+int8-...` with quantised weights.

    Call it on the thread that runs the blocks.
    """
    facts = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
    }
    digest = hashlib.blake2b(digest_size=8, person=b"shoal-numerics")
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for rows in _ROW_COUNTS:
        for result in _probe(config, torch_dtype(dtype), device, rows):
            digest.update(result.to("cpu", torch.float32).contiguous().numpy().tobytes())
    if quantize == "none":
        return f"{dtype}-{digest.hexdigest()}"
    digest.update(quantize.encode())
    for result in _probe_quantized(config, torch_dtype(dtype), device, quantize):
        digest.update(result.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"{dtype}+{quantize}-{digest.hexdigest()}"


@torch.inference_mode()
def _probe_quantized(
    config: Any, dtype: torch.dtype, device: str, quantize: Quantization
) -> list[torch.Tensor]:
    """A quantised layer as wide as the hidden states, with few rows and with many."""
    generator = torch.Generator().manual_seed(20_27)
    hidden = min(int(config.hidden_size), _WIDTH_MAX)
    layer = torch.nn.Linear(hidden, hidden, bias=False)
    layer.weight = torch.nn.Parameter(
        torch.randn(hidden, hidden, generator=generator).to(device=device, dtype=dtype),
        requires_grad=False,
    )
    quantized = quantized_linear(layer, quantize, device)
    inputs = (torch.randn(rows, hidden, generator=generator) for rows in _QUANTIZED_ROW_COUNTS)
    return [quantized(rows.to(device=device, dtype=dtype)) for rows in inputs]


@torch.inference_mode()
def _probe(config: Any, dtype: torch.dtype, device: str, rows: int) -> list[torch.Tensor]:
    """Linear layers, normalisation, gating and grouped attention on seeded values."""
    generator = torch.Generator().manual_seed(20_26)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    hidden = min(int(config.hidden_size), _WIDTH_MAX)
    inner = min(int(getattr(config, "intermediate_size", None) or 4 * hidden), _WIDTH_MAX)
    heads = int(getattr(config, "num_attention_heads", None) or config.num_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    if heads % kv_heads:
        kv_heads = heads
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    x = random(rows, hidden)
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
    up = functional.silu(functional.linear(normed, random(inner, hidden) / hidden**0.5))
    down = functional.linear(up, random(hidden, inner) / inner**0.5)
    query = random(1, heads, rows, head_size)
    key = random(1, kv_heads, rows + _KV_TOKENS, head_size)
    value = random(1, kv_heads, rows + _KV_TOKENS, head_size)
    seen = torch.ones(rows, rows + _KV_TOKENS, dtype=torch.bool, device=device).tril(_KV_TOKENS)
    attended = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=None if rows == 1 else seen, enable_gqa=kv_heads != heads
    )
    return [normed, up, down, attended]
