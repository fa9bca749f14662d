"""What every HeadBackend does: one suite, on each implementation."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from shoal.base.errors import BadInput, BadOutput, InternalError
from shoal.base.head import Choosing, Chosen, HeadBackend
from shoal.hf import served_head
from shoal.hf.head import load_head
from shoal.hf.score_rules import ScoreRules
from shoal.hf.served_head import serve_head
from shoal.lab.toy_head import ToyHead
from shoal.model.rows import rows_to_bytes
from tests.models import tiny_source

SAMPLED = Choosing(temperature=0.9, seed=5, top_k=40, top_p=0.95)


def torch_head(dtype: str) -> HeadBackend:
    return serve_head(load_head(tiny_source("llama"), dtype=dtype), dtype)


SUBJECTS: dict[str, Callable[[], HeadBackend]] = {
    "toy": ToyHead,
    "torch float32": lambda: torch_head("float32"),
    "torch bfloat16": lambda: torch_head("bfloat16"),
}


@pytest.fixture(params=SUBJECTS.values(), ids=SUBJECTS.keys())
def make(request: pytest.FixtureRequest) -> Callable[[], HeadBackend]:
    made: Callable[[], HeadBackend] = request.param
    return made


def run(make: Callable[[], HeadBackend], story: Callable[[HeadBackend], Any]) -> None:
    async def work() -> None:
        head = make()
        try:
            await story(head)
        finally:
            await head.aclose()

    asyncio.run(work())


def rows(head: HeadBackend, count: int) -> list[bytes]:
    """Rows that could have left the last block: embeddings have the right form."""
    return [head.embed([index], head.facts.encoding) for index in range(count)]


async def answer(head: HeadBackend, choosing: Choosing, given: list[bytes], **more: Any) -> list:
    turn = head.begin(choosing, [1, 2, 3], [])
    return [
        await turn.choose(row, head.facts.encoding, 3 + at, **more) for at, row in enumerate(given)
    ]


def test_facts_and_embeddings(make: Callable[[], HeadBackend]) -> None:
    async def story(head: HeadBackend) -> None:
        facts = head.facts
        assert facts.vocab_size > 1
        assert facts.numerics
        assert head.facts == make().facts
        both = head.embed([4, 5], facts.encoding)
        assert both == head.embed([4], facts.encoding) + head.embed([5], facts.encoding, 1)
        for ids in ([], [-1], [facts.vocab_size]):
            with pytest.raises(BadInput):
                head.embed(ids, facts.encoding)
        with pytest.raises(BadInput):
            head.embed([1], "int3")

    run(make, story)


@pytest.mark.parametrize("choosing", [Choosing(), SAMPLED, Choosing(presence=1.5, repetition=1.2)])
def test_company_changes_nothing(make: Callable[[], HeadBackend], choosing: Choosing) -> None:
    async def story(head: HeadBackend) -> None:
        given = rows(head, 12)
        alone = await answer(head, choosing, given)
        together = await asyncio.gather(*(answer(head, choosing, given) for _ in range(5)))
        assert all(one == alone for one in together)
        assert all(0 <= one.id < head.facts.vocab_size for one in alone)

    run(make, story)


def test_an_answer_goes_on_where_another_one_stopped(make: Callable[[], HeadBackend]) -> None:
    choosing = Choosing(temperature=1.0, seed=3, frequency=0.7, repetition=1.3)

    async def story(head: HeadBackend) -> None:
        given = rows(head, 8)
        whole = [one.id for one in await answer(head, choosing, given)]
        turn = head.begin(choosing, [1, 2, 3], whole[:5])
        rest = [await turn.choose(row, head.facts.encoding, 8 + at)
                for at, row in enumerate(given[5:])]  # fmt: skip
        assert [one.id for one in rest] == whole[5:]

    run(make, story)


def test_seeds_and_positions_decide(make: Callable[[], HeadBackend]) -> None:
    async def story(head: HeadBackend) -> None:
        given = rows(head, 1) * 8
        hot = [Choosing(temperature=50.0, seed=seed) for seed in (1, 1, 2)]
        first, same, other = [
            [one.id for one in await answer(head, choosing, given)] for choosing in hot
        ]
        assert first == same != other
        assert len(set(first)) > 1

    run(make, story)


def test_only_what_is_allowed_is_chosen(make: Callable[[], HeadBackend]) -> None:
    async def story(head: HeadBackend) -> None:
        given = rows(head, 6)
        mask = bytes([0b0010_0100])  # tokens 2 and 5; none behind the end
        for choosing in (Choosing(), SAMPLED):
            found = await answer(head, choosing, given, allowed=mask)
            assert {one.id for one in found} <= {2, 5}
        with pytest.raises(BadInput):
            await answer(head, Choosing(), given, allowed=bytes(4))

    run(make, story)


def test_chances_are_told_when_asked(make: Callable[[], HeadBackend]) -> None:
    async def story(head: HeadBackend) -> None:
        (silent,) = await answer(head, Choosing(), rows(head, 1))
        assert (silent.chance, silent.best) == (None, ())
        (told,) = await answer(head, Choosing(num_best=3), rows(head, 1))
        assert told.id == silent.id
        assert told.chance is not None
        assert told.chance <= 0.0
        assert told.best[0] == (told.id, told.chance)
        assert [chance for _, chance in told.best] == sorted(
            (chance for _, chance in told.best), reverse=True
        )
        assert len(told.best) == 3

    run(make, story)


def test_nonsense_hurts_nobody_else(make: Callable[[], HeadBackend]) -> None:
    async def story(head: HeadBackend) -> None:
        row, encoding = rows(head, 1)[0], head.facts.encoding
        with pytest.raises(BadInput):
            head.begin(Choosing(bias=((head.facts.vocab_size, 1.0),)), [1], [])
        good = head.begin(Choosing(), [1], [])
        bad = head.begin(Choosing(), [1], [])
        found = await asyncio.gather(
            good.choose(row, encoding, 1), bad.choose(row[:-1], encoding, 1),
            return_exceptions=True,
        )  # fmt: skip
        assert isinstance(found[1], BadInput)
        assert found[0] == (await answer(head, Choosing(), [row]))[0]

    run(make, story)


def test_a_bug_met_by_one_row_is_that_rows_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(served_head._Turn):
        def pick(self, scores: Any, position: int, allowed: bytes | None) -> Chosen:
            raise IndexError

    async def story(head: HeadBackend) -> None:
        row = rows(head, 1)[0]
        assert isinstance(head, served_head.ServedHead)
        found = await asyncio.gather(
            head.begin(Choosing(), [1], []).choose(row, "float32", 1),
            Broken(head, Choosing(), [1], []).choose(row, "float32", 1),
            return_exceptions=True,
        )
        assert isinstance(found[1], InternalError)
        assert found[0] == (await answer(head, Choosing(), [row]))[0]

    run(SUBJECTS["torch float32"], story)
    assert "no token chosen" in caplog.text


def test_a_long_answer_is_taken_up_without_a_call_per_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def story(head: HeadBackend) -> None:
        monkeypatch.delattr(ScoreRules, "add")  # 9 us each, on the event loop
        head.begin(Choosing(presence=1.0), [1], [2] * 3)

    run(SUBJECTS["torch float32"], story)


def test_scores_that_are_no_numbers_are_the_models_fault() -> None:
    import torch

    async def story(head: HeadBackend) -> None:
        row = rows(head, 1)[0]
        poison = rows_to_bytes(torch.full((1, len(row) // 4), torch.nan), "float32")
        found = await asyncio.gather(
            head.begin(Choosing(), [1], []).choose(row, "float32", 1),
            head.begin(Choosing(), [1], []).choose(poison, "float32", 1),
            return_exceptions=True,
        )
        assert isinstance(found[1], BadOutput)
        assert found[0] == (await answer(head, Choosing(), [row]))[0]

    run(SUBJECTS["torch float32"], story)
