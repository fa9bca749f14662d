"""What a config alone tells: sizes, support, refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.base.errors import ModelUnsupported
from shoal.base.spans import Span
from shoal.hf.head import load_head
from shoal.model.facts import kv_values, model_facts, support_table
from shoal.model.families import FAMILIES as ROWS
from shoal.model.families import family_of, recurrent_blocks, session_tokens_max
from shoal.model.kv_cache import PAGE_TOKENS
from shoal.model.memory_source import MemorySource
from shoal.model.span_model import load_span
from tests.models import FAMILIES, tiny_config, tiny_source

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def source_of(model_type: str, **options: object) -> MemorySource:
    config = AutoConfig.for_model(model_type, **SMALL | options)
    model = AutoModelForCausalLM.from_config(config)
    return MemorySource(model.config, model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_a_loaded_span(family: str) -> None:
    source = tiny_source(family)
    config = source.config
    span = Span(0, config.num_hidden_layers)
    model = load_span(source, span, dtype="bfloat16")
    facts = model_facts(config)
    cache = model.new_cache(span)
    rows = torch.zeros(3, config.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        model.forward(rows, 0, cache, span)
    for index in range(span.end):
        held = model.block(index).state_dict().values()
        # A few weights stay in float32 whatever the dtype.
        assert (
            0
            <= sum(t.numel() * t.element_size() for t in held)
            - facts.block_bytes["bfloat16"][index]
            <= sum(4 * t.numel() for t in held if t.dtype == torch.float32)
        )
        if index in recurrent_blocks(config):
            assert kv_values(config, index) == 0
            continue
        held = cache.layers[index].rows.num_bytes
        assert facts.kv_bytes_per_token["bfloat16"][index] == held // PAGE_TOKENS


def test_the_table_knows_which_families_are_recurrent() -> None:
    for name in FAMILIES:
        config = tiny_config(name)
        assert bool(recurrent_blocks(config)) == ROWS[config.model_type].is_recurrent, name
    rows = {row.architecture: row for row in support_table()}
    assert rows["mamba2"].truncate == rows["mamba2"].fork == "start"
    assert rows["llama"].truncate == rows["bloom"].fork == "any"
    assert rows["gpt_oss"].truncate == rows["mistral"].fork == "margin"
    assert model_facts(tiny_config("mistral_full")).support.truncate == "any"
    assert model_facts(tiny_config("qwen2_sliding")).support.truncate == "margin"
    assert all(row.is_tested for row in rows.values())
    assert rows["deepseek_v3"].engine == "batched"
    assert {name for name, row in rows.items() if row.exact == "yes"} == {
        "bloom",
        "falcon",
        "mamba2",
    }


def test_blocks_that_fit_leave_room_for_the_cache() -> None:
    facts = model_facts(tiny_config())
    per_block = facts.block_bytes["float32"][0] + 100 * facts.kv_bytes_per_token["float32"][0]
    gib = per_block / (1 << 30)
    assert facts.blocks_that_fit(gib * 2.5, "float32", 100) == 2
    assert facts.blocks_that_fit(gib * 0.5, "float32", 100) == 0
    assert facts.blocks_that_fit(gib * 99, "float32", 100) == facts.num_blocks


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, 1024),
        ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}, 1024),
        (LONGROPE, 128),
    ],
)
def test_sessions_end_where_rotary_tables_would_change(
    rope: dict[str, object], expected: int
) -> None:
    config = AutoConfig.for_model(
        "llama", **SMALL, max_position_embeddings=1024, rope_parameters=dict(rope)
    )
    assert session_tokens_max(config) == expected


def test_rotary_tables_stay_put_up_to_the_end_of_a_session() -> None:
    source = source_of("llama", max_position_embeddings=1024, rope_parameters=dict(LONGROPE))
    model = load_span(source, Span(0, 2), dtype="float32")
    table = model.base.rotary_emb.inv_freq.clone()
    rows = torch.ones(1, 32)
    with torch.inference_mode():
        for position in (0, 127):
            model.forward(rows, position, model.new_cache(Span(0, 2)), Span(0, 2))
            assert torch.equal(model.base.rotary_emb.inv_freq, table)


@pytest.mark.parametrize("model_type", ["olmo2", "qwen2_moe", "seed_oss"])
def test_an_architecture_without_a_row_is_tried(model_type: str) -> None:
    source = source_of(model_type)
    assert not family_of(source.config).is_tested
    load_span(source, Span(1, 2), dtype="float32")
    load_head(source)


def test_a_factor_on_embeddings_that_no_row_knows_is_caught() -> None:
    source = source_of("granitemoe", embedding_multiplier=3.0)
    with pytest.raises(ModelUnsupported, match="outside its blocks"):
        load_span(source, Span(0, 1), dtype="float32")
    with pytest.raises(ModelUnsupported, match="head"):
        load_head(source)


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("gemma4_text", {}, "per-layer embeddings"),
        ("llama4_text", {}, "chunked_attention"),
        ("falcon_h1", {}, "hybrid"),
        ("gptj", {}, "no part 'layers'"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ("t5", {}, "no causal language model"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    model_type: str, options: dict[str, object], reason: str
) -> None:
    config = AutoConfig.for_model(model_type, **SMALL | options)
    with pytest.raises(ModelUnsupported, match=reason):
        load_span(MemorySource(config, {}), Span(0, 1), dtype="float32")
