"""Memory to the byte: caches of every kind of attention, logs, weights."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.model.facts import kv_values
from shoal.plan.memory import CacheShape, gqa, log_bytes, mha, mla, mqa, quantised_bytes
from shoal.plan.spec import ModelSpec
from tests.unit.plan_problems import BLOOM_BLOCK_BYTES, bloom, problems, simple


@pytest.mark.parametrize(
    ("shape", "bytes_per_token"),
    [
        (mha(112, 128), 57344),  # BLOOM-176B
        (gqa(8, 128), 4096),  # Llama-2-70B
        (mqa(64), 256),  # Falcon-7B
        (mla(512, 64), 1152),  # DeepSeek-V3
        (mla(512, 64, 1), 576),
        (gqa(8, 128, 4), 8192),
    ],
)
def test_bytes_per_token(shape, bytes_per_token):
    assert shape.session_bytes(1) == bytes_per_token
    assert shape.session_bytes(1000) == 1000 * bytes_per_token


def test_a_sliding_window_keeps_no_more_than_itself_and_its_margin():
    shape = gqa(1, 1, window=100, margin_tokens=28)
    assert [shape.session_bytes(tokens) // 4 for tokens in (1, 128, 129, 9999)] == [
        1,
        128,
        128,
        128,
    ]


def test_whole_pages_are_taken():
    shape = gqa(1, 1)
    assert [shape.session_bytes(tokens, 16) // 4 for tokens in (0, 1, 16, 17)] == [0, 16, 16, 32]
    assert gqa(1, 1, window=20).session_bytes(100, 16) // 4 == 32


def test_recurrent_state_does_not_grow():
    shape = CacheShape(values_per_token=0, state_bytes=77)
    assert shape.session_bytes(1) == shape.session_bytes(10**6) == 77


def test_the_published_sizes_of_bloom():
    assert round(BLOOM_BLOCK_BYTES / 1e9, 4) == 1.3234
    assert mha(112, 128).session_bytes(148) == 8_486_912
    assert round(mha(112, 128).session_bytes(4096) / 1e9, 4) == 0.2349
    assert quantised_bytes(1000, 4) == 500
    # "An A100-80GB with 53 blocks has room for 21 sessions of 20 + 128 tokens."
    problem = bloom(1, 0, [0.0], rate=1.0, tokens_out=128)
    span = Span(0, 53)
    left = 80 * 10**9 - problem.weight_bytes(span)
    assert left // problem.session_bytes(span) == 21


def test_a_log_is_rows_that_were_sent():
    assert log_bytes(10, 28672) == 286720


def test_a_log_is_kept_once_per_hop():
    shape = gqa(1, 1)
    model = ModelSpec(
        hidden_size=3, weight_bytes=(5,) * 4, caches=(shape,) * 4, row_bytes=6, page_tokens=1
    )
    problem = simple([1000], 4)
    object.__setattr__(problem, "model", model)
    assert problem.log_bytes == 2 * 6
    assert problem.session_bytes(Span(1, 3)) == 2 * 2 * 4 + 12


@pytest.mark.parametrize(
    "wrong",
    [
        {"values_per_token": -1},
        {"values_per_token": 1, "window": 0},
        {"values_per_token": 1, "value_bytes": 0},
        {"values_per_token": 1, "margin_tokens": -1},
    ],
)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ConfigError):
        CacheShape(**wrong)


@given(problems(), st.data())
def test_what_blocks_max_allows_fits_wherever_it_lies(problem, data):
    server = data.draw(st.integers(0, len(problem.servers) - 1))
    sessions = data.draw(st.integers(0, 5))
    size = problem.blocks_max(server, sessions)
    memory = problem.servers[server].memory_bytes
    for start in range(problem.num_blocks - size + 1):
        span = Span(start, start + size)
        if size:
            used = problem.weight_bytes(span) + sessions * problem.session_bytes(span)
            assert used <= memory
    if size < problem.num_blocks:
        weights, session = problem.worst_bytes(size + 1)
        assert weights + sessions * session > memory


@given(st.integers(0, 500), st.integers(1, 30), st.integers(1, 9), st.integers(0, 9))
def test_with_equal_blocks_it_is_the_published_formula(memory, weight, cache, sessions):
    problem = simple([memory], 12, weight=weight, cache=cache)
    assert problem.blocks_max(0, sessions) == min(memory // (weight + cache * sessions), 12)


@pytest.mark.parametrize(
    ("model_type", "options", "shape"),
    [
        ("llama", {"num_key_value_heads": 8}, gqa(8, 128)),
        ("llama", {}, mha(32, 128)),
        ("falcon", {}, mqa(64)),
        ("deepseek_v3", {}, mla(512, 64)),
    ],
)
def test_shapes_are_what_the_engine_counts(model_type, options, shape):
    """`shoal.model.facts` reads the same numbers from a model's config."""
    config = AutoConfig.for_model(model_type, **options)
    assert kv_values(config, 0) == shape.values_per_token
