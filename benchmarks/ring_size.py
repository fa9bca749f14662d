"""What each node of a ring takes, by nodes and samples: measured beside computed.

A process is what it takes when it has probed the model's engine with a made-up block, as nodes
do before they offer memory. Over: what the peak is above process, weights, cache and log. Bound:
what a starter counts with, which no peak may exceed; room: what is left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack

from random_model import saved_source
from ring_alone import PROMPT
from ring_parts import Case, client_of, model_of, spans_of, started
from shoal.cli.ring_memory import RESERVE_BYTES
from shoal.cli.ring_sizes import ring_sizes
from shoal.hf.head import load_head
from shoal.hf.ring import RingChoice, RingReader, RingSample, open_ring
from shoal.hf.sampling import Sampler
from shoal.model.kv_cache import PAGE_TOKENS
from shoal.plan.ring import RingModel

SPLITS = {
    "304m": ((12,), (5, 7), (2, 5, 5)),
    "1.1b": ((22,), (10, 12), (6, 8, 8)),
    "small": ((3, 5),),
}
"""Blocks of one, two and three nodes: those of MDI-LLM's table."""

TOKENS = 248
"""Of each sample."""


def sizes_of(shape: str, samples: int) -> RingModel:
    """As a starter counts, for so many samples on each node; bfloat16."""
    pages = -(-TOKENS // PAGE_TOKENS) * PAGE_TOKENS
    return ring_sizes(saved_source(shape).config, "bfloat16", "none", samples * pages)


async def memory_of(shape: str, splits: Sequence[int]) -> list[dict[str, object]]:
    """What each node of a ring takes, by samples; measured beside computed."""
    spans, rows = spans_of(splits), []
    model = model_of(load_head(saved_source(shape), dtype="bfloat16"))
    with ExitStack() as processes:
        nodes = started(Case(shape), spans, processes, 2)
        async with AsyncExitStack() as stack:
            client = await client_of(shape, nodes, spans, stack)
            for samples in (len(splits), 4 * len(splits)):
                sample = RingSample(
                    prompt_ids=PROMPT * 29, max_new_tokens=TOKENS - 29 * len(PROMPT),
                    sampler=Sampler(),
                )  # fmt: skip
                ring = await open_ring(client, model, RingChoice(), [sample] * samples)
                await ring.run([sample] * samples, RingReader())
                for index, node in enumerate(nodes):
                    look = await node.ask("look")
                    sizes, span = sizes_of(shape, samples), spans[index]
                    weights = sum(sizes.weight_bytes[span.start : span.end]) / 1e6
                    planned = sizes.need_bytes(span) / 1e6
                    cache = planned - weights - sizes.spare_bytes / 1e6
                    process, peak = look["offered_bytes"] / 1e6, look["peak_bytes"] / 1e6
                    bound = process + planned + RESERVE_BYTES / 1e6
                    rows.append({
                        "shape": shape, "nodes": len(splits), "samples": samples, "node": index,
                        "blocks": splits[index], "weights_mb": weights, "cache_mb": cache,
                        "process_mb": process,
                        "peak_mb": peak, "over_mb": peak - process - weights - cache,
                        "bound_mb": bound, "room_mb": bound - peak,
                    })  # fmt: skip
    return rows
