"""Every family: a chain with our head computes what transformers computes on the whole model.

One cache per sequence; tests/golden/test_batched.py does the same for packed rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.base.backend import SequenceId
from shoal.base.errors import BadInput, ModelCorrupt
from shoal.base.spans import Span
from shoal.hf.head import load_head
from shoal.model.families import FAMILIES as ROWS
from shoal.model.families import recurrent_blocks
from shoal.model.parts import Parts
from shoal.model.safetensors_source import SafetensorsSource
from shoal.model.span_model import load_span, span_tensor_names
from tests.golden.chains import Chain, greedy, with_chain
from tests.golden.test_chain_equals_model import prompt_of
from tests.models import FAMILIES, OTHER_FAMILIES, save_safetensors, tiny_model, tiny_source

LAST = 4
BORDERS = (0, 1, 3, LAST)
CHUNKS = (14, 1, 9)
"""The first is longer than the sliding windows."""

DECODE_STEPS = 32
EXPERTS = ("qwen3_moe", "qwen3_next", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe")
ATTENTION = [name for name in OTHER_FAMILIES if name not in ("qwen3_next", "mamba2")]


class WholeModel:
    """transformers on one machine: hidden states before the final norm, and scores."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float32) -> None:
        self.model = tiny_model(family, dtype)
        self.cache: dict[str, Any] = {}
        self.before_norm = torch.zeros(0)
        Parts(self.model).norm.register_forward_pre_hook(self._keep)

    def _keep(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.before_norm = inputs[0][0].float()

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(input_ids=torch.tensor([tokens]), use_cache=True, **self.cache)
        self.cache = {
            name: output[name] for name in ("past_key_values", "cache_params") if name in output
        }
        return self.before_norm, output.logits[0].float()


def test_all_families_of_the_table_are_tested() -> None:
    assert {tiny_source(name).config.model_type for name in FAMILIES} == set(ROWS)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_hidden_states_and_scores_are_bit_equal(family: str) -> None:
    source = tiny_source(family)
    head = load_head(source)
    whole = WholeModel(family)
    tokens = prompt_of(sum(CHUNKS) + DECODE_STEPS)

    async def compare(chain: Chain) -> None:
        for size in (*CHUNKS, *[1] * DECODE_STEPS):
            part = tokens[chain.length : chain.length + size]
            rows = await chain.step(head.embed(part, "float32", chain.length))
            hidden, scores = whole.step(part)
            assert hidden.isfinite().all()
            assert torch.equal(chain.tensor(rows), hidden), f"rows before {chain.length} differ"
            assert torch.equal(head.logits(rows, "float32"), scores)

    with_chain(Chain(source, BORDERS), compare)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    source = tiny_source(family)
    prompt = prompt_of(11)
    expected = tiny_model(family).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=DECODE_STEPS,
        do_sample=False,
    )[0, len(prompt) :]
    head = load_head(source)
    tokens = with_chain(
        Chain(source, (0, 3, LAST)), lambda chain: greedy(chain, head, prompt, DECODE_STEPS)
    )
    assert tokens == expected.tolist()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "gemma3", "qwen3_next", "bloom"])
def test_bfloat16_is_bit_equal(family: str, tmp_path: Path) -> None:
    save_safetensors(tmp_path, family, dtype=torch.bfloat16)
    source = SafetensorsSource(tmp_path)
    head = load_head(source, dtype="bfloat16")
    whole = WholeModel(family)
    whole.model = type(whole.model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = prompt_of(24)

    async def compare(chain: Chain) -> None:
        for part in (tokens[:16], *([token] for token in tokens[16:])):
            rows = await chain.step(head.embed(part, "bfloat16", chain.length))
            assert torch.equal(head.logits(rows, "bfloat16"), whole.step(part)[1])

    with_chain(Chain(source, (0, 2, LAST), "bfloat16"), compare)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_saved_checkpoints_give_the_same_weights(family: str, tmp_path: Path) -> None:
    save_safetensors(tmp_path, family, sharded=family in EXPERTS)
    source = SafetensorsSource(tmp_path)
    span = Span(1, 3)
    ours = load_span(source, span, dtype="float32")
    expected = load_span(tiny_source(family), span, dtype="float32")
    for index in range(span.start, span.end):
        state = expected.block(index).state_dict()
        assert ours.block(index).state_dict().keys() == state.keys()
        for name, tensor in ours.block(index).state_dict().items():
            assert torch.equal(tensor, state[name]), name
    load_head(source)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_stored_one_by_one_are_those_of_the_span(family: str, tmp_path: Path) -> None:
    save_safetensors(tmp_path, family)
    source = SafetensorsSource(tmp_path)
    names = span_tensor_names(source, Span(2, 3))
    assert names == [name for name in source.tensor_names() if ".layers.2." in name]


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    save_safetensors(tmp_path, "mixtral")

    class Without(SafetensorsSource):
        def tensor_names(self) -> list[str]:
            names = super().tensor_names()
            return [n for n in names if ".layers.1." not in n or "experts.3.w2" not in n]

    with pytest.raises(ModelCorrupt, match=r"down_proj.*4 experts.*hold 3"):
        load_span(Without(tmp_path), Span(1, 2), dtype="float32")


@pytest.mark.parametrize("family", ATTENTION)
def test_truncated_and_forked_sequences_go_on_like_fresh_ones(family: str) -> None:
    source = tiny_source(family)
    head = load_head(source)
    tokens = prompt_of(40)
    kept = 17

    async def compare(chain: Chain) -> None:
        parent, child, fresh = SequenceId(0), SequenceId(1), SequenceId(2)
        for backend in chain.backends:
            backend.open(fresh, backend.facts.span)
        first = head.embed(tokens[:kept], "float32")
        await chain.step(first, fresh)
        expected = await chain.step(head.embed(tokens[kept:23], "float32", kept), fresh)
        chain.length = 0
        await chain.step(first)
        await chain.step(head.embed(tokens[30:40], "float32", kept))
        for backend in chain.backends:
            assert backend.fork(parent, child, kept) == kept
            assert backend.truncate(parent, kept) == kept
        for sequence in (child, parent):
            chain.length = kept
            rows = head.embed(tokens[kept:23], "float32", kept)
            assert await chain.step(rows, sequence) == expected

    with_chain(Chain(source, (0, 3, LAST)), compare)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_recurrent_states_fork_whole_and_go_back_to_the_start(family: str) -> None:
    source = tiny_source(family)
    head = load_head(source)
    tokens = prompt_of(30)
    assert recurrent_blocks(source.config)

    async def compare(chain: Chain) -> None:
        parent, child, short = SequenceId(0), SequenceId(1), SequenceId(2)
        (backend,) = chain.backends
        await chain.step(head.embed(tokens[:20], "float32"))
        assert backend.truncate(parent, 20) == 20
        assert backend.fork(parent, child, 20) == 20
        assert backend.fork(parent, short, 19) == 0
        expected = await chain.step(head.embed(tokens[20:], "float32"))
        chain.length = 20
        assert await chain.step(head.embed(tokens[20:], "float32"), child) == expected
        assert backend.truncate(parent, 25) == 0
        for sequence in (parent, short):
            chain.length = 0
            await chain.step(head.embed(tokens[:20], "float32"), sequence)
            assert await chain.step(head.embed(tokens[20:], "float32"), sequence) == expected

    with_chain(Chain(source, (0, LAST)), compare)


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2"])
def test_a_call_that_fails_leaves_recurrent_states_as_they_were(family: str) -> None:
    model = load_span(tiny_source(family), Span(0, LAST), dtype="float32")
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(9, model.config.hidden_size, generator=generator)
    span = model.span
    with torch.inference_mode():
        cache, other = model.new_cache(span), model.new_cache(span)
        for each in (cache, other):
            model.forward(rows[:7], 0, each, span)
            each.commit(7)
        for size in (1, 2):
            model.forward(rows[-size:] * 3, 7, cache, span)
        assert torch.equal(
            model.forward(rows[7:8], 7, cache, span), model.forward(rows[7:8], 7, other, span)
        )
        cache.commit(1)
        other.commit(1)
        fork = cache.forked(8)
        model.forward(rows[:1], 8, cache, span)
        assert torch.equal(
            model.forward(rows[8:], 8, fork, span), model.forward(rows[8:], 8, other, span)
        )


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_positions_beyond_the_learned_ones_are_refused(family: str) -> None:
    head = load_head(tiny_source(family))
    head.embed([1, 2], "float32", 510)
    with pytest.raises(BadInput, match="no position 512"):
        head.embed([1, 2], "float32", 511)
