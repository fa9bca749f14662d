"""Samples round a ring of real blocks: each text is that of transformers."""

from __future__ import annotations

import asyncio

import pytest
import torch

from shoal.base.errors import BadInput, ConfigError
from shoal.client.config import ClientConfig
from shoal.hf.head import load_head
from shoal.hf.head_batch import HeadBatch, find_head_tiles
from shoal.hf.local_swarm import LocalSwarm
from shoal.hf.ring import RingChoice, RingModel, RingReader, RingSample, open_ring
from shoal.hf.sampling import Sampler
from shoal.model.families import num_blocks
from shoal.model.manifest import model_hash
from tests.models import tiny_model, tiny_source

CHOSEN = RingChoice()
FIXED = RingChoice(slots=3, at_once=4, chunk_rows=16)

LENGTHS = (3, 20, 9, 14, 1, 7, 11)


@pytest.fixture(scope="module")
def texts():
    """Prompts of different lengths and what transformers continues them with."""
    model = tiny_model("llama")
    rng = torch.Generator().manual_seed(3)
    found = []
    for number, length in enumerate(LENGTHS):
        size = 5 + 40 * (number % 3)
        ids = torch.randint(5, model.config.vocab_size, (1, size), generator=rng)
        with torch.no_grad():
            out = model.generate(
                ids, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        found.append((tuple(ids[0].tolist()), tuple(out[0, size:].tolist())))
    return found


def run(folder, samples, choice=CHOSEN, eos_ids=(), fails=frozenset()):
    """The answers by number, and the ring."""
    source = tiny_source("llama")
    head = load_head(source, dtype="float32")
    model = RingModel(
        head=head, batch=HeadBatch(head, find_head_tiles(head)), encoding="float32", eos_ids=eos_ids
    )
    config = ClientConfig(
        model=model_hash(source, folder), num_blocks=num_blocks(source.config),
        hidden_size=head.hidden_size,
    )  # fmt: skip
    answers = {}

    async def work(swarm):
        async with swarm.visit(config) as visit:
            ring = await open_ring(visit.client, model, choice, samples)
            reader = RingReader(answer=lambda n, one: answers.update({n: one}))
            failed = await ring.run(samples, reader)
            assert set(failed) == set(fails)
            return ring, visit.client.num_sessions

    with LocalSwarm(source, cache_dir=folder) as swarm:
        ring, left = swarm.loop().run(work(swarm))
    assert left == 0
    return answers, ring


@pytest.mark.parametrize("choice", [CHOSEN, FIXED])
def test_many_samples_of_different_lengths(tmp_path, texts, choice):
    samples = [
        RingSample(prompt_ids=ids, max_new_tokens=length, sampler=Sampler())
        for (ids, _), length in zip(texts, LENGTHS, strict=True)
    ]
    answers, ring = run(tmp_path, samples, choice)
    assert [answers[number].token_ids for number in range(len(samples))] == [t for _, t in texts]
    assert len(ring.pace.spans) == 3
    assert ring.decoding == 0


def test_an_end_token_ends_a_sample(tmp_path, texts):
    ids, wanted = texts[1]
    end = wanted[4]
    first = wanted.index(end)
    sample = RingSample(prompt_ids=ids, max_new_tokens=20, sampler=Sampler())
    answers, _ = run(tmp_path, [sample, sample], eos_ids=(end,))
    assert [one.token_ids for one in answers.values()] == [wanted[: first + 1]] * 2


def test_a_sample_that_fits_nowhere_is_refused_before_anything_runs(tmp_path):
    sample = RingSample(prompt_ids=(5, 6), max_new_tokens=100_000, sampler=Sampler())
    with pytest.raises(ConfigError, match="smallest cache of the ring holds 8192"):
        run(tmp_path, [sample])


def test_a_sample_that_fails_leaves_the_others(tmp_path, texts):
    """Its token is in no vocabulary; each of the others gets its text."""
    good = [
        RingSample(prompt_ids=ids, max_new_tokens=length, sampler=Sampler())
        for (ids, _), length in zip(texts, LENGTHS, strict=True)
    ]
    bad = RingSample(prompt_ids=(5, 10**9), max_new_tokens=4, sampler=Sampler())
    answers, ring = run(tmp_path, [*good[:2], bad, *good[2:]], fails={2})
    found = [answers[number].token_ids for number in sorted(answers)]
    assert found == [text for _, text in texts]
    assert 2 not in answers
    assert ring.prompts.mark() is not None
    with pytest.raises(BadInput, match="vocabulary"):
        run(tmp_path, [bad, bad])


def test_bad_samples_are_refused():
    with pytest.raises(BadInput, match="no tokens"):
        RingSample(prompt_ids=(), max_new_tokens=1, sampler=Sampler())
    with pytest.raises(ConfigError, match="ask for one"):
        RingSample(prompt_ids=(1,), max_new_tokens=0, sampler=Sampler())
    assert asyncio.iscoroutinefunction(open_ring)


def test_a_chain_that_changed_is_followed(tmp_path, texts):
    """A server dies amid the samples, another has its blocks: the same texts, other stages."""
    source = tiny_source("llama")
    head = load_head(source, dtype="float32")
    model = RingModel(head=head, batch=HeadBatch(head, find_head_tiles(head)), encoding="float32")
    config = ClientConfig(
        model=model_hash(source, tmp_path), num_blocks=num_blocks(source.config),
        hidden_size=head.hidden_size,
    )  # fmt: skip
    blocks = num_blocks(source.config)
    samples = [
        RingSample(prompt_ids=ids, max_new_tokens=length, sampler=Sampler())
        for (ids, _), length in zip(texts, LENGTHS, strict=True)
    ]
    answers, tokens, crashes = {}, [], []
    spans = [(0, 2), (2, blocks), (2, 4), (4, blocks)]
    with LocalSwarm(source, spans=spans, cache_dir=tmp_path) as swarm:

        async def work():
            async with swarm.visit(config) as visit:
                ring = await open_ring(visit.client, model, CHOSEN, samples)
                stages = len(ring.pace.spans)
                victim = ring.pace.peers[1]

                def came(number, token):
                    tokens.append(token)
                    if len(tokens) == 12:
                        crashes.append(asyncio.ensure_future(swarm._crash(victim)))

                reader = RingReader(token=came, answer=lambda n, one: answers.update({n: one}))
                await ring.run(samples, reader)
                return stages, ring.pace.spans, victim in ring.pace.peers

        before, after, is_still_used = swarm.loop().run(work())
    assert [answers[number].token_ids for number in range(len(samples))] == [t for _, t in texts]
    assert not is_still_used
    assert sum(after) == blocks
    assert {before, len(after)} == {2, 3}
    assert any(one.recoveries for one in answers.values())
