"""Servers killed under transformers' own generation: beams, lookups, sampled batches."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from shoal.hf import AutoDistributedModelForCausalLM
from tests.e2e.processes import servers
from tests.e2e.recovery import draw_prompt, running

pytestmark = pytest.mark.e2e

SERVERS = "a 0:3, b 3:6, a2 0:3, b2 3:6"
TOKENS = 30
REPEATING = draw_prompt(12) * 3

WAYS = {
    "beams": {"num_beams": 4, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 5, "do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.9, "num_return_sequences": 3},
}


class KillAt(StoppingCriteria):
    """Kills a server with sessions that holds these blocks before some steps; stops nothing."""

    def __init__(self, fleet, blocks, steps):
        self._fleet = fleet
        self._blocks = blocks
        self._steps = steps
        self._step = 0
        self.killed = []

    def __call__(self, input_ids, scores, **kwargs):
        self._step += 1
        if self._step in self._steps:
            holders = [place for place in self._fleet.up if place.blocks == self._blocks]
            now = servers(self._fleet.addresses[0])
            (victim,) = [place.name for place in holders if now[place.peer]["sessions"]]
            self._fleet.kill(victim)
            self.killed.append(victim)
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.fixture(scope="module")
def living(nursery, exactable_model, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys")
    exact = ("--exact", "always")
    with running(nursery, exactable_model, keys, SERVERS, *exact, encoding="float32") as fleet:
        yield fleet


@pytest.fixture
def fleet(living):
    yield living
    living.restore()


@pytest.mark.parametrize("blocks", ["0:3", "3:6"], ids=["first", "last"])
@pytest.mark.parametrize("way", WAYS)
def test_a_kill_within_transformers_generate(fleet, exactable_model, way, blocks):
    def generate(model, *criteria):
        torch.manual_seed(5)
        ids = torch.tensor([REPEATING])
        given = StoppingCriteriaList(criteria)
        return model.generate(ids, max_new_tokens=TOKENS, stopping_criteria=given, **WAYS[way])

    with AutoDistributedModelForCausalLM.from_pretrained(
        exactable_model, join=fleet.addresses
    ) as model:
        expected = generate(model)
        killer = KillAt(fleet, blocks, {4})
        assert torch.equal(generate(model, killer), expected)
    assert len(killer.killed) == 1
