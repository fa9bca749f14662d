"""transformers' own `generate` over a chain gives the tokens that it gives on one machine."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from shoal.base.errors import BadInput, ConfigError
from shoal.hf import ChainCache
from tests.golden.hf_cases import Collected, Pair, padded, pair, prompts
from tests.models import tiny_model

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "bloom")
NEW = {"max_new_tokens": 24}
GREEDY = NEW | {"do_sample": False}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with pair(request.param) as made:
        yield made
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(
                f"\n{made.family}: {len(made.divergences)} of {made.num_texts} texts diverge at a "
                f"near-tie {made.divergences}"
            )
        assert made.num_sessions == 0, "sessions were left open"


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    with pair("llama") as made:
        yield made
        assert made.num_sessions == 0, "sessions were left open"


def test_greedy(both: Pair) -> None:
    both.generate(prompts(1, 11), **GREEDY)


@pytest.mark.parametrize("seed", [1, 2])
def test_sampling_with_a_seed(both: Pair, seed: int) -> None:
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.9}
    both.generate(prompts(1, 11), seed=seed, **NEW, **options)


def test_several_samples_of_one_prompt(both: Pair) -> None:
    both.generate(prompts(1, 11), num_return_sequences=3, do_sample=True, **NEW)


def test_unequal_prompts(both: Pair) -> None:
    ids, mask = padded([5, 11, 1, 8])
    both.generate(ids, attention_mask=mask, **GREEDY)


def test_beams(both: Pair) -> None:
    both.generate(prompts(1, 11), num_beams=4, num_return_sequences=2, **GREEDY)


def test_beams_of_unequal_prompts(both: Pair) -> None:
    ids, mask = padded([5, 11, 8])
    both.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=12, do_sample=False)


def test_sampled_beams(both: Pair) -> None:
    both.generate(prompts(1, 11), num_beams=3, do_sample=True, max_new_tokens=12)


def test_processors(both: Pair) -> None:
    both.generate(prompts(1, 11), repetition_penalty=1.4, no_repeat_ngram_size=3, **GREEDY)


def test_an_end_token_ends_rows_one_by_one(both: Pair) -> None:
    ids, mask = padded([5, 11, 8])
    text = both.generate(ids, attention_mask=mask, **GREEDY)
    both.generate(ids, attention_mask=mask, eos_token_id=int(text[1, -12]), **GREEDY)


def test_prompt_lookup(both: Pair) -> None:
    repeating = prompts(1, 6).repeat(1, 4)
    both.generate(repeating, prompt_lookup_num_tokens=4, **GREEDY)


@pytest.mark.parametrize("is_good", [True, False], ids=["same model", "another model"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_assistant_model(both: Pair, is_good: bool) -> None:
    assistant = copy.deepcopy(both.reference) if is_good else tiny_model(both.family, seed=8)
    both.generate(prompts(1, 11), assistant_model=assistant, **GREEDY)


def test_an_assistant_that_samples(llama: Pair) -> None:
    assistant = copy.deepcopy(llama.reference)
    llama.generate(prompts(1, 11), assistant_model=assistant, do_sample=True, **NEW)


def test_a_conversation_goes_on_without_a_new_prefill(both: Pair) -> None:
    ids, mask = padded([5, 11])
    texts = []
    for model in (both.ours, both.reference):
        kept: dict[str, Any] = {"return_dict_in_generate": True, "pad_token_id": 0, **GREEDY}
        first = model.generate(ids, attention_mask=mask, **kept)
        said = torch.cat([first.sequences, prompts(2, 4, seed=9)], dim=1)
        whole = torch.ones_like(said)
        whole[:, : mask.shape[1]] = mask
        if model is both.ours:
            cache = first.past_key_values
            assert isinstance(cache, ChainCache)
            held = [row.length for row in cache.rows]
            assert cache.get_seq_length() == first.sequences.shape[1] - 1
        again = model.generate(
            said, attention_mask=whole, past_key_values=first.past_key_values, **kept
        )
        texts.append(again.sequences)
    assert [len(row.chunks) for row in cache.rows] == [48, 48]
    assert all(row.length > length for row, length in zip(cache.rows, held, strict=True))
    both.compare(*texts, begin=ids.shape[1])


def test_a_prompt_is_computed_once_for_many_continuations(llama: Pair) -> None:
    prompt = prompts(1, 11)
    cache = llama.ours(prompt).past_key_values
    for tail in (3, 4):
        text = torch.cat([prompt, prompts(1, tail, seed=tail)], dim=1)
        mine = llama.ours.generate(text, past_key_values=copy.deepcopy(cache), **GREEDY)
        llama.compare(mine, llama.reference.generate(text, **GREEDY), begin=text.shape[1])
    assert cache.get_seq_length() == 11


def test_given_embeddings(both: Pair) -> None:
    embeddings = both.reference.get_input_embeddings()(prompts(1, 9)).detach()
    texts = [
        model.generate(inputs_embeds=embeddings, attention_mask=torch.ones(1, 9).long(), **GREEDY)
        for model in (both.ours, both.reference)
    ]
    both.compare(*texts, begin=0)


def test_prefill_in_chunks_and_without_a_cache(llama: Pair) -> None:
    llama.generate(prompts(1, 40), prefill_chunk_size=16, **GREEDY)
    llama.generate(prompts(2, 7), use_cache=False, max_new_tokens=4, do_sample=False)


class AfterTokens(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_streamers_and_stopping_criteria(llama: Pair) -> None:
    streamer = Collected()
    criteria = StoppingCriteriaList([AfterTokens(17), MaxTimeCriteria(1e6)])
    text = llama.ours.generate(
        prompts(1, 11), streamer=streamer, stopping_criteria=criteria, **GREEDY
    )
    assert text.shape == (1, 17)
    assert streamer.tokens == text[0].tolist()
    assert streamer.has_ended
    llama.generate(prompts(1, 11), stopping_criteria=criteria, **GREEDY)


def test_scores_are_those_of_transformers(both: Pair) -> None:
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    mine, theirs = (
        model.generate(prompts(2, 11), **options) for model in (both.ours, both.reference)
    )
    for ours, other in zip(mine.logits, theirs.logits, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-4)


def test_a_server_dies_while_a_text_grows(llama: Pair) -> None:
    with pair("llama", replicas=2) as double:
        lost: list[Any] = []

        class Killing(AfterTokens):
            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
                if input_ids.shape[1] == self.length:
                    lost.append(session.chain[1].peer)
                    double.swarm.crash(lost[-1])
                return torch.full((input_ids.shape[0],), False)

        with double.ours.session() as session:
            prompt = prompts(1, 11)
            text = double.ours.generate(
                prompt,
                past_key_values=session.past_key_values,
                stopping_criteria=StoppingCriteriaList([Killing(18)]),
                **GREEDY,
            )
            assert [recovery.lost for recovery in session.recoveries] == [(lost[0],)]
            assert lost[0] not in [stage.peer for stage in session.chain]
        llama.compare(text, llama.reference.generate(prompt, **GREEDY), begin=11)


# --- what is refused -----------------------------------------------------------------------


def test_masks_with_holes_are_refused(llama: Pair) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 2] = 0
    mask[1, 0] = 0
    with pytest.raises(BadInput, match="row 1 has a hole at column 2"):
        llama.ours.generate(prompts(2, 6), attention_mask=mask, pad_token_id=0, **GREEDY)


def test_padding_at_the_end_is_refused_where_rows_go_on(llama: Pair) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with pytest.raises(BadInput, match="padding_side = 'left'"):
        llama.ours(prompts(2, 6), attention_mask=mask)
    mine = llama.ours(prompts(2, 6), attention_mask=mask, use_cache=False).logits
    theirs = llama.reference(prompts(2, 6), attention_mask=mask).logits
    torch.testing.assert_close(mine[1, :4], theirs[1, :4], atol=1e-4, rtol=1e-4)
    assert not mine[1, 4:].any()


def test_a_forgotten_mask_is_noticed(llama: Pair) -> None:
    ids, mask = padded([3, 6])
    cache = llama.ours(ids, attention_mask=mask).past_key_values
    longer = torch.cat([ids, prompts(2, 2)], dim=1)
    with pytest.raises(BadInput, match=r"whole conversation|give attention_mask"):
        llama.ours.generate(longer, past_key_values=cache, **GREEDY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "stay at the servers"),
        ({"position_ids": torch.tensor([[1, 2, 3]])}, "position_ids of row 0"),
        ({"inputs_embeds": torch.zeros(1, 3, 48)}, "give one of them"),
        ({"attention_mask": torch.ones(1, 5)}, r"give \(1, 3\)"),
        ({"attention_mask": torch.zeros(1, 3)}, "row 0 has no tokens"),
        ({"attention_mask": torch.full((1, 3), 2)}, "only hold 0"),
        ({"past_key_values": {}}, "past_key_values is a dict"),
    ],
)
def test_what_sessions_cannot_have(llama: Pair, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        llama.ours(prompts(1, 3), **options)


@pytest.mark.parametrize("length", [6, 2])
def test_a_text_without_news_is_refused(llama: Pair, length: int) -> None:
    cache = llama.ours(prompts(1, 6)).past_key_values
    with pytest.raises(BadInput, match=f"holds 6 tokens, the input {length}"):
        llama.ours.generate(prompts(1, 6)[:, :length], past_key_values=cache, **GREEDY)
    cache.crop(-1)
    text = llama.ours.generate(prompts(1, 6), past_key_values=cache, **GREEDY)
    assert torch.equal(text, llama.reference.generate(prompts(1, 6), **GREEDY))


def test_a_cache_implementation_is_refused(llama: Pair) -> None:
    with pytest.raises(ConfigError, match="leave cache_implementation out"):
        llama.ours.generate(prompts(1, 3), cache_implementation="static", **GREEDY)


def test_tokens_outside_the_vocabulary_leave_the_cache_as_it_was(llama: Pair) -> None:
    cache = llama.ours(prompts(2, 5)).past_key_values
    with pytest.raises(BadInput, match="outside the vocabulary"):
        llama.ours(torch.tensor([[1], [999]]), past_key_values=cache)
    assert [row.length for row in cache.rows] == [5, 5]
    mine = llama.ours(torch.tensor([[1], [2]]), past_key_values=cache).logits
    theirs = llama.reference(torch.cat([prompts(2, 5), torch.tensor([[1], [2]])], 1)).logits
    torch.testing.assert_close(mine, theirs[:, -1:], atol=1e-4, rtol=1e-4)
