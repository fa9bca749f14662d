"""Training through servers is training: losses and gradients of the whole model in one process."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.base.adapters import DropoutKey
from shoal.base.ids import short
from shoal.base.spans import Span
from shoal.cli.finetune_spec import DataChoice, Examples, RunSpec
from shoal.cli.finetuning import Finetuning
from shoal.client.training import TrainConfig
from shoal.client.training_check import Disputed
from shoal.hf import AutoDistributedModelForCausalLM, DistributedModelForCausalLM, LocalSwarm
from shoal.hf.tuning_build import build
from shoal.hf.tuning_classes import AutoDistributedModelForSequenceClassification
from shoal.hf.tuning_examples import make_batch
from shoal.hf.tuning_loop import TuningRun
from shoal.hf.tuning_settings import TuningSettings
from shoal.hf.tuning_swarm import SwarmBase
from shoal.hf.tuning_whole import load_whole
from shoal.model.known import default_cache_dir
from shoal.model.source import open_source
from tests.models import tiny_source
from tests.tuning_cases import METHODS, letters, shaken, tiny_examples

REAL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def model() -> Iterator[DistributedModelForCausalLM]:
    source = tiny_source("llama")
    with (
        LocalSwarm(source) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(source, join=swarm) as opened,
    ):
        yield opened


def pair(method: str, model: DistributedModelForCausalLM):
    """The same beginning at servers and here."""
    whole = load_whole(tiny_source("llama"), model.model_name)
    bases = (SwarmBase(model, is_rounded=False), whole)
    return [shaken(build(base, METHODS[method], num_classes=3, seed=4)) for base in bases]


def test_a_swarm_lacks_what_only_servers_have_that_failed(
    model: DistributedModelForCausalLM,
) -> None:
    base, client = SwarmBase(model), model.connection.visit.client

    async def fail() -> None:
        for server in client.view().servers:
            client.experience.failed(server.peer, asyncio.get_running_loop().time())

    async def serve() -> None:
        for server in client.view().servers:
            client.experience.served(server.peer, asyncio.get_running_loop().time())

    assert base.missing() == []
    model.connection.loop.run(fail())
    assert base.missing() == [Span(0, base.num_blocks)]
    model.connection.loop.run(serve())
    assert base.missing() == []


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_gradients_are_those_of_one_process(
    method: str, model: DistributedModelForCausalLM
) -> None:
    ours, whole = pair(method, model)
    batch = make_batch(tiny_examples(5).examples, is_classes=METHODS[method].name == "classifier")
    key = DropoutKey(seed=3, step=7)
    losses = [tuned.train()(batch, key) for tuned in (ours, whole)]
    assert losses[0].num_counted == losses[1].num_counted
    torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-5, atol=1e-5)
    for loss in losses:
        loss.total.backward()
    for (name, mine), other in zip(ours.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None, name
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    ids = torch.tensor([[5, 6, 7], [9, 8, 0]])
    logits = [tuned.eval().logits(ids, (3, 2)) for tuned in (ours, whole)]
    torch.testing.assert_close(logits[0][1, :2], logits[1][1, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "deep-prompt", "lora", "classifier"])
def test_a_run_is_that_of_one_process(method: str, model: DistributedModelForCausalLM) -> None:
    settings = TuningSettings(num_steps=5, batch_size=3, learning_rate=1e-2, accumulate=2)
    runs = [
        TuningRun(tuned, settings, tiny_examples(), tiny_examples(3, seed=8), lambda: 0.0)
        for tuned in pair(method, model)
    ]
    for run in runs:
        list(run.advance())
    ours, whole = (run.history for run in runs)
    losses = [[one.loss for one in history.steps] for history in (ours, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] != pytest.approx(losses[0][0], rel=1e-3)
    assert ours.evaluations[-1].loss == pytest.approx(whole.evaluations[-1].loss, rel=1e-3)


def test_what_travels_in_bfloat16_learns_as_well(model: DistributedModelForCausalLM) -> None:
    tuned = build(SwarmBase(model), METHODS["lora"], num_classes=0, seed=4)
    settings = TuningSettings(num_steps=8, batch_size=12, learning_rate=1e-2)
    run = TuningRun(tuned, settings, tiny_examples(), None, lambda: 0.0)
    list(run.advance())
    losses = [one.loss for one in run.history.steps]
    assert losses[-1] < losses[0] - 0.1


def test_a_dead_server_changes_no_number() -> None:
    """A span's only other server takes over, between steps and in their middle."""
    source = tiny_source("llama")
    settings = TuningSettings(num_steps=4, batch_size=4, learning_rate=1e-2)
    histories = []
    for crashes in (False, True):
        with (
            LocalSwarm(source, replicas=2) as swarm,
            AutoDistributedModelForCausalLM.from_pretrained(source, join=swarm) as opened,
        ):
            tuned = build(SwarmBase(opened), METHODS["deep-prompt"], num_classes=0, seed=4)
            run = TuningRun(tuned, settings, tiny_examples(), None, lambda: 0.0)
            victims = random.Random(5).sample(swarm.peers[:3], 2) if crashes else []
            for _ in run.advance():
                if victims:
                    swarm.crash(victims.pop())
            histories.append(run.history)
    assert histories[0] == histories[1]


class Altered:
    """A source of which the second load gets another tensor: that server's values are wrong."""

    def __init__(self) -> None:
        self._source = tiny_source("llama")
        self._num_loads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> torch.Tensor:
        value = self._source.read(name)
        if name != "model.layers.1.self_attn.v_proj.weight":
            return value
        self._num_loads += 1
        return -value if self._num_loads == 2 else value


@contextmanager
def checked_run(
    source: Any, num_servers: int, out: Path
) -> Iterator[tuple[Finetuning, LocalSwarm]]:
    """What `shoal finetune --verify-rate 1` does once it has joined."""
    spec = RunSpec(
        model="m", given="m", fingerprint="", method=METHODS["prompt"],
        data=DataChoice(path=out, eval_path=None, eval_share=0.0, length_max=64, seed=0),
        settings=TuningSettings(num_steps=4, batch_size=6, save_every=2, learning_rate=1e-2),
    )  # fmt: skip
    examples = Examples(learned=tiny_examples(), kept_back=None, label_names=())
    with (
        LocalSwarm(source, spans=[(0, 7)] * num_servers) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(tiny_source("llama"), join=swarm) as model,
    ):
        model.training_steps = TrainConfig(micro_tokens=12, verify_rate=1.0)
        tuned = build(SwarmBase(model), spec.method, num_classes=0, seed=4)
        run = TuningRun(tuned, spec.settings, examples.learned, None, lambda: 0.0)
        yield Finetuning(spec, out, examples, run, model.config), swarm


def test_a_run_leaves_a_server_that_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    histories = []
    for source in (tiny_source("llama"), Altered()):
        with checked_run(source, 3, tmp_path) as (work, swarm):
            work.train()
            histories.append(work.run.history)
            liar = short(swarm.peers[1])
    assert histories[0] == histories[1]
    said = capsys.readouterr().err
    assert said.count("gave wrong values in step 1 and is not used any more") == 1
    assert f"peer {liar} gave wrong values in step 1" in said
    assert "all that it gave since step 1 was checked" in said
    assert f"wrong values from {liar}" in said
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-2.safetensors", "step-4.safetensors"]


def test_a_run_ends_where_two_servers_disagree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        checked_run(Altered(), 2, tmp_path) as (work, swarm),
        pytest.raises(Disputed, match="no third server decides"),
    ):
        work.train()
    said = capsys.readouterr().err
    for peer in swarm.peers:
        assert f"peer {short(peer)}: if it is wrong, all that it gave since step 1" in said
    assert "could not go on after step 0; go on with: shoal finetune --resume" in said


def test_telling_classes(tmp_path: Path) -> None:
    source = tiny_source("llama")
    texts = ["rain", "rainy", "sun", "sunny"]
    tokenizer = letters()
    tokenizer.pad_token = tokenizer.eos_token
    with LocalSwarm(source) as swarm:
        with AutoDistributedModelForSequenceClassification.from_pretrained(
            source, join=swarm, label_names=("dry", "wet"), prompt_tokens=2
        ) as model:
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
            inputs = tokenizer(
                texts, padding=True, return_tensors="pt", return_token_type_ids=False
            )
            for _ in range(20):
                loss = model(**inputs, labels=torch.tensor([1, 1, 0, 0])).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert model.tell(texts, tokenizer) == ["wet", "wet", "dry", "dry"]
            model.save_pretrained(tmp_path)
        with AutoDistributedModelForSequenceClassification.from_pretrained(
            source, join=swarm, learned=tmp_path
        ) as again:
            assert again.tell(texts, tokenizer) == ["wet", "wet", "dry", "dry"]


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("method", ["prompt", "lora"])
def test_the_real_model_learns_as_in_one_process(method: str) -> None:
    """Three steps through three servers and in this process: the same losses to 1e-3."""
    source = open_source(REAL, default_cache_dir(os.environ))
    settings = TuningSettings(num_steps=3, batch_size=2, learning_rate=1e-2)
    histories = []
    with (
        LocalSwarm(source) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(source, join=swarm) as opened,
    ):
        for base in (
            SwarmBase(opened, is_rounded=False),
            load_whole(source, opened.model_name),
        ):
            tuned = build(base, METHODS[method], num_classes=0, seed=4)
            run = TuningRun(tuned, settings, tiny_examples(), None, lambda: 0.0)
            list(run.advance())
            histories.append([one.loss for one in run.history.steps])
    assert histories[0] == pytest.approx(histories[1], rel=1e-3)
    assert histories[0][-1] != pytest.approx(histories[0][0], rel=1e-3)
