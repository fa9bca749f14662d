"""What each node of a ring takes, by nodes and samples: measured beside computed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack

from random_model import SHAPES, saved_source
from ring_alone import PROMPT
from ring_parts import Case, client_of, model_of, spans_of, started
from shoal.hf.head import load_head
from shoal.hf.ring import RingChoice, RingReader, RingSample, open_ring
from shoal.hf.sampling import Sampler

SPLITS = {
    "304m": ((12,), (5, 7), (2, 5, 5)),
    "1.1b": ((22,), (10, 12), (6, 8, 8)),
    "small": ((3, 5),),
}
"""Blocks of one, two and three nodes: those of MDI-LLM's table."""


def computed_mb(shape: str, blocks: int, samples: int, tokens: int) -> tuple[float, float]:
    """Weights, and keys and values in pages of 32 positions, of a node; bfloat16."""
    sizes = SHAPES[shape]
    width, wide = sizes["hidden_size"], sizes["intermediate_size"]
    kv = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    weights = 2 * width * width + 2 * width * kv + 3 * width * wide + 2 * width
    pages = -(-tokens // 32) * 32
    return 2 * blocks * weights / 1e6, 2 * blocks * samples * pages * 2 * kv / 1e6


async def memory_of(shape: str, splits: Sequence[int]) -> list[dict[str, object]]:
    """What each node of a ring takes, by samples; measured beside computed."""
    spans, rows = spans_of(splits), []
    model = model_of(load_head(saved_source(shape), dtype="bfloat16"))
    tokens = 248
    with ExitStack() as processes:
        nodes = started(Case(shape), spans, processes, 2)
        async with AsyncExitStack() as stack:
            client = await client_of(shape, nodes, spans, stack)
            for samples in (len(splits), 4 * len(splits)):
                sample = RingSample(
                    prompt_ids=PROMPT * 29, max_new_tokens=tokens - 29 * len(PROMPT),
                    sampler=Sampler(),
                )  # fmt: skip
                ring = await open_ring(client, model, RingChoice(), [sample] * samples)
                await ring.run([sample] * samples, RingReader())
                for index, node in enumerate(nodes):
                    look = await node.ask("look")
                    weights, cache = computed_mb(shape, splits[index], samples, tokens)
                    process, peak = look["offered_bytes"] / 1e6, look["peak_bytes"] / 1e6
                    rows.append({
                        "shape": shape, "nodes": len(splits), "samples": samples, "node": index,
                        "blocks": splits[index], "weights_mb": weights, "cache_mb": cache,
                        "imports_mb": look["empty_bytes"] / 1e6, "process_mb": process,
                        "peak_mb": peak, "over_mb": peak - process - weights - cache,
                    })  # fmt: skip
    return rows
