"""kill -9 of real servers in the middle of answers: the text stays the same."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.recovery import (
    GREEDY,
    SAMPLED,
    draw_prompt,
    killing_at,
    pauses,
    read,
    reader,
    running,
    until,
)

pytestmark = pytest.mark.e2e

SERVERS = "a 0:2, b 2:4, c 4:6, a2 0:2, b2 2:4, c2 4:6, b3 2:4"
TOKENS = 60
PROMPT = draw_prompt(40)
LONG = draw_prompt(1500, seed=1)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def living(request, nursery, exactable_model, tmp_path_factory):
    """Exact servers of one numerics class, two or three for each span."""
    keys = tmp_path_factory.mktemp("keys")
    exact = ("--exact", "always", "--dtype", request.param)
    with running(nursery, exactable_model, keys, SERVERS, *exact, encoding=request.param) as fleet:
        if read(fleet, PROMPT, 1).numerics != "exact":
            pytest.skip("this processor's kernels have no row tiles: nothing is promised")
        yield fleet


@pytest.fixture
def fleet(living):
    yield living
    living.restore()


@pytest.fixture(scope="module")
def undisturbed(living):
    """Answers without any failure, each read once: `undisturbed(prompt, tokens, sampler)`."""
    known = {}

    def answer(prompt=PROMPT, num_tokens=TOKENS, sampler=GREEDY):
        key = (tuple(prompt), num_tokens, sampler)
        if key not in known:
            known[key] = read(living, prompt, num_tokens, sampler=sampler)
            assert known[key].recoveries == ()
        return known[key]

    return answer


def test_the_answer_is_that_of_one_machine(living, undisturbed, exactable_model):
    if living.encoding != "float32":
        pytest.skip("bfloat16 rounds elsewhere when everything is in one process")
    model = AutoModelForCausalLM.from_pretrained(exactable_model, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    whole = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    assert undisturbed().token_ids == whole[0, len(PROMPT) :].tolist()


HOPS = {
    "the first": (0,),
    "the middle": (1,),
    "the last": (2,),
    "two neighbours": (0, 1),
    "the other neighbours": (1, 2),
    "both ends": (0, 2),
    "all": (0, 1, 2),
}


@pytest.mark.parametrize("who", HOPS)
def test_hops_are_killed(fleet, undisturbed, who):
    expected = undisturbed()
    answer = read(fleet, PROMPT, TOKENS, acts={20: fleet.kill_hops(*HOPS[who])})
    assert answer.token_ids == expected.token_ids
    assert answer.numerics == "exact"
    repairs = fleet.repairs(answer.recoveries)
    assert len({name for lost, _ in repairs for name in lost}) == len(HOPS[who])
    assert all(one.replayed_tokens >= len(PROMPT) + 19 for one in answer.recoveries)
    print(f"{who}: {repairs}, pauses {pauses(answer)}")


def test_all_servers_are_killed_and_come_back(fleet, undisturbed):
    """Nobody is left; the client waits, and its own log is all that there is."""
    expected = undisturbed()

    def act(session):
        fleet.kill(*fleet.places)
        fleet.restart("b", "a2", "c")

    answer = read(fleet, PROMPT, TOKENS, acts={20: act})
    assert answer.token_ids == expected.token_ids
    assert answer.chain == ["a2", "b", "c"]
    print(f"all came back: pauses {pauses(answer)}")


def test_the_replacement_dies_during_the_replay(fleet, undisturbed):
    """And so does the next one: the third is right."""
    expected = undisturbed(LONG, 20)
    died = []

    async def kill_replacements(session):
        for _ in range(2):
            (name,) = [fleet.chain(session)[1]]
            died.append(name)
            fleet.kill(name)
            await until(lambda name=name: fleet.chain(session)[1] != name)

    async def story():
        async with reader(fleet) as one:
            tasks = []
            act = {
                10: lambda session: tasks.append(asyncio.create_task(kill_replacements(session)))
            }
            answer = await one.read(LONG, 20, acts=act)
            await asyncio.gather(*tasks)
            return answer

    answer = asyncio.run(story())
    assert answer.token_ids == expected.token_ids
    assert len(set(died)) == 2
    assert answer.chain[1] not in died
    print(fleet.repairs(answer.recoveries))


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_killed_during_the_prefill_of_a_long_prompt(fleet, undisturbed, hop):
    """When the first chunk is through, and others are on their way."""
    expected = undisturbed(LONG, 20)

    async def story():
        async with reader(fleet) as one:
            task = asyncio.create_task(one.read(LONG, 20))
            await until(lambda: one.sessions and one.sessions[0].received_length > 0)
            state = one.sessions[0]
            assert state.received_length < len(LONG)
            fleet.kill(fleet.name(state.chain[hop].peer))
            return await task

    answer = asyncio.run(story())
    assert answer.token_ids == expected.token_ids
    assert len(answer.recoveries) == 1


@pytest.mark.parametrize("is_in_company", [False, True], ids=["alone", "in company"])
@pytest.mark.parametrize("sampler", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_kills_at_random_tokens(fleet, undisturbed, sampler, is_in_company):
    """Several in one answer. Company decodes at the same servers, and is right as well."""
    rng = random.Random(f"{fleet.encoding} {sampler} {is_in_company}")
    expected = undisturbed(sampler=sampler)
    company = [draw_prompt(length, seed=length) for length in (5, 70, 33)] * is_in_company
    right = [undisturbed(prompt, 2 * TOKENS, sampler).token_ids for prompt in company]

    async def story():
        async with reader(fleet) as one, reader(fleet) as other, asyncio.TaskGroup() as group:
            others = [
                group.create_task(other.read(prompt, 2 * TOKENS, sampler=sampler))
                for prompt in company
            ]
            acts = killing_at(rng, fleet, TOKENS, 4)
            answer = await one.read(PROMPT, TOKENS, sampler=sampler, acts=acts)
            return answer, [await task for task in others]

    answer, others = asyncio.run(story())
    assert answer.token_ids == expected.token_ids
    assert [one.token_ids for one in others] == right
    assert {answer.numerics, *(one.numerics for one in others)} == {"exact"}
    assert len(answer.recoveries) >= 3
    print(f"random kills: pauses {pauses(answer)}")


def test_what_is_not_exact_does_not_say_so(nursery, exactable_model, tmp_path):
    """Before and after a repair; one that leaves the numerics class says that."""
    places = "a 0:6, b 0:6, c 0:6 --dtype bfloat16"
    with running(
        nursery, exactable_model, tmp_path, places, "--exact", "never", encoding="float32"
    ) as fleet:
        fleet.kill("c")
        assert read(fleet, PROMPT, 5).numerics == "same-class"
        answer = read(fleet, PROMPT, 20, acts={10: fleet.kill_hops(0)})
        assert (answer.numerics, len(answer.recoveries)) == ("same-class", 1)

        fleet.start("c")
        answer = read(fleet, PROMPT, 20, acts={10: fleet.kill_hops(0)})
        assert len(answer.recoveries) == 1
        assert answer.numerics == "crossed"
