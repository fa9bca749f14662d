"""The same with a real model: SmolLM2, in the dtype that people use."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.cli.models import open_model
from tests.e2e.recovery import GREEDY, SAMPLED, pauses, reader, running

pytestmark = [pytest.mark.e2e, pytest.mark.real_model, pytest.mark.timeout(300)]

NAME = "smollm2-135m-instruct"
SERVERS = "a 0:10, b 10:20, c 20:30, b2 10:20, b3 10:20"
TOKENS = 40
PROMPT = "The three most important things to know about the sea are"
OTHER = "Write a short letter to a lighthouse keeper."


@pytest.fixture(scope="module")
def ids():
    tokenizer = open_model(NAME).source.tokenizer()
    return {text: [int(one) for one in tokenizer(text)["input_ids"]] for text in (PROMPT, OTHER)}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def fleet(request, nursery, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys")
    exact = ("--exact", "always", "--dtype", request.param)
    with running(nursery, Path(NAME), keys, SERVERS, *exact, encoding=request.param) as fleet:
        yield fleet


def test_kill_and_stop_in_one_answer_in_company(fleet, ids):
    """kill -9, later SIGSTOP of the replacement, while somebody else samples an answer."""

    async def both(acts):
        async with reader(fleet) as one, reader(fleet) as other, asyncio.TaskGroup() as group:
            sampled = group.create_task(other.read(ids[OTHER], TOKENS, sampler=SAMPLED))
            greedy = await one.read(ids[PROMPT], TOKENS, sampler=GREEDY, acts=acts)
            return greedy, await sampled

    expected = asyncio.run(both({}))
    if {one.numerics for one in expected} != {"exact"}:
        pytest.skip("this processor's kernels have no row tiles: nothing is promised")
    acts = {10: fleet.kill_hops(1), 25: fleet.stop_hop(1)}
    answers = asyncio.run(both(acts))
    fleet.restore()
    for answer, right in zip(answers, expected, strict=True):
        assert answer.token_ids == right.token_ids
        assert answer.numerics == "exact"
    print(
        f"{fleet.encoding}: {fleet.repairs(answers[0].recoveries)} {pauses(answers[0])}, longest "
        f"pauses {[round(one.longest_pause_s, 2) for one in (*expected, *answers)]} s"
    )
