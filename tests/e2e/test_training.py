"""Servers killed for real while a step of training is on its way: the gradient stays the same."""

from __future__ import annotations

import threading

import pytest
import torch

from shoal.base.adapters import AdapterConfig
from shoal.base.spans import Span
from shoal.client.training import TrainConfig
from shoal.hf import AutoDistributedModelForCausalLM
from shoal.hf.training import Tuning, run_blocks
from tests.e2e.recovery import running

pytestmark = pytest.mark.e2e

SERVERS = "a 0:3, b 3:6, a2 0:3, b2 3:6"
TARGET = "self_attn.q_proj"
LENGTHS = (24,) * 40
RANK = 4


@pytest.fixture(scope="module")
def living(nursery, exactable_model, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys")
    with running(nursery, exactable_model, keys, SERVERS, encoding="float32") as fleet:
        yield fleet


@pytest.fixture
def fleet(living):
    yield living
    living.restore()


class Step:
    """One step of LoRA in every block: the same each time."""

    def __init__(self, model):
        generator = torch.Generator().manual_seed(1)
        size = model.head.hidden_size

        def draw(*shape):
            return (torch.randn(shape, generator=generator) * 0.1).requires_grad_()

        self.model = model
        self.rows = draw(sum(LENGTHS), size)
        self.pairs = {
            block: {TARGET: (draw(RANK, size), draw(size, RANK))}
            for block in range(model.num_blocks)
        }
        config = AdapterConfig(rank=RANK, alpha=8.0, targets=(TARGET,))
        self.tuning = Tuning(lora=self.pairs, config=config, encoding="float32")
        self.leaves = [
            self.rows, *(one for pairs in self.pairs.values() for one in pairs[TARGET])
        ]  # fmt: skip

    def forward(self):
        span = Span(0, self.model.num_blocks)
        return run_blocks(self.model, self.rows, LENGTHS, span, self.tuning)

    def backward(self, output):
        return torch.autograd.grad(output.pow(2).mean(), self.leaves)


class Killer:
    """Kills servers once a model sent so much more."""

    def __init__(self, fleet, model, num_bytes, *names):
        self._client = model.training_client
        self._limit = self._client.sent_bytes + num_bytes
        self._kill = lambda: fleet.kill(*names)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *exc):
        self._is_over.set()
        self._thread.join()

    def _watch(self):
        while self._client.sent_bytes < self._limit:
            if self._is_over.wait(0.001):
                return
        self._kill()


@pytest.mark.parametrize("when", ["out", "between", "back"])
@pytest.mark.parametrize("names", [("a",), ("a2", "b")], ids=["one", "two"])
def test_kills_amid_a_step(fleet, exactable_model, when, names):
    with AutoDistributedModelForCausalLM.from_pretrained(
        exactable_model, join=fleet.addresses
    ) as model:
        model.training_steps = TrainConfig(micro_tokens=48)
        step = Step(model)
        expected = step.backward(step.forward())
        assert not model.training_client.repairs
        quarter = model.training_client.sent_bytes // 8
        if when == "out":
            with Killer(fleet, model, quarter, *names):
                output = step.forward()
        else:
            output = step.forward()
        if when == "between":
            fleet.kill(*names)
        if when == "back":
            with Killer(fleet, model, quarter, *names):
                found = step.backward(output)
        else:
            found = step.backward(output)
        assert model.training_client.repairs
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
