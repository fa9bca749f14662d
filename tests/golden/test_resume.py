"""An answer that another process goes on with: the same tokens from the same bits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from shoal.client.chain_session import ChainSession
from shoal.hf import (
    AutoDistributedModelForCausalLM,
    DistributedModelForCausalLM,
    LocalSwarm,
    Session,
)
from shoal.hf.generation import generate
from shoal.hf.sampling import Sampler
from shoal.hf.saved_answer import SavedAnswer, pack_answer
from tests.models import VOCABULARY, tiny_source

PROMPT = [(7 * index + 3) % VOCABULARY for index in range(150)]
"""Longer than a chunk: its shape is part of what must be repeated."""

NUM_TOKENS = 12


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Iterator[DistributedModelForCausalLM]:
    source = tiny_source("llama")
    with (
        LocalSwarm(source, dtype=request.param) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(source, join=swarm) as model,
    ):
        yield model


class Watched:
    """A head that keeps the rows it was asked about."""

    def __init__(self, head):
        self.embed = head.embed
        self._head = head
        self.rows: list[bytes] = []

    def logits(self, rows, encoding):
        self.rows.append(bytes(rows))
        return self._head.logits(rows, encoding)


def answer(model, sampler, past_ids=(), *, num_tokens=NUM_TOKENS, num_others=0):
    """New tokens, the last row behind each, and the numerics: in company if asked for."""
    client = model.connection.visit.client

    async def write(past, count) -> tuple[list[int], list[bytes], str]:
        head = Watched(model.head)
        session: ChainSession
        async with await client.open_session(model._chains.encoding) as session:
            tokens = [
                token.id
                async for token in generate(
                    session, head, PROMPT, max_new_tokens=count, sampler=sampler, past_ids=past
                )
            ]
            return tokens, head.rows, session.numerics

    async def all_of_them():
        others = [write((), NUM_TOKENS) for _ in range(num_others)]
        mine, *_ = await asyncio.gather(write(past_ids, num_tokens), *others)
        return mine

    return model.connection.loop.run(all_of_them())


@pytest.mark.parametrize(
    "sampler", [Sampler(), Sampler(temperature=0.9, seed=11)], ids=["greedy", "seeded"]
)
def test_it_goes_on_as_if_nothing_had_happened(model, sampler) -> None:
    tokens, rows, numerics = answer(model, sampler)
    for num_past, num_others in ((1, 0), (7, 2), (NUM_TOKENS - 1, 0)):
        past, left = tokens[:num_past], NUM_TOKENS - num_past
        again, rows_again, _ = answer(model, sampler, past, num_tokens=left, num_others=num_others)
        assert past + again == tokens
        if numerics == "exact":
            assert rows_again == rows[num_past:], "the same bits"


def test_the_library_opens_the_file(model, tmp_path) -> None:
    """`Session.load` has the same tokens behind it, and the next one is the same."""
    tokens, _, _ = answer(model, Sampler())
    saved = SavedAnswer(
        model=model.model_name, given="tiny", num_blocks=model.num_blocks,
        prompt_ids=tuple(PROMPT), token_ids=tuple(tokens[:5]), max_new_tokens=NUM_TOKENS,
        sampler=Sampler(), encoding="float32", is_compressed=False,
    )  # fmt: skip
    path = tmp_path / "answer"
    path.write_bytes(pack_answer(saved))
    with Session.load(model, path) as session:
        assert session.token_ids == [*PROMPT, *tokens[:5]]
        session.truncate(session.length - 1)
        hidden = session.step_ids([tokens[4]], last=True)
        assert int(model.logits(hidden)[-1].argmax()) == tokens[5]
