"""Gradients through a swarm are those of the whole model: inputs, prompts, adapters, loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoal.base.errors import AdapterBad, BadInput
from shoal.base.spans import Span
from shoal.client.training import TrainConfig
from shoal.hf import AutoDistributedModelForCausalLM
from shoal.hf.local_swarm import LocalSwarm
from shoal.hf.model import DistributedModelForCausalLM
from shoal.hf.training import Tuning, run_blocks
from tests.models import tiny_model, tiny_source
from tests.training_cases import Tensors, make_tensors, whole_forward

FAMILY = "qwen3_moe"
LENGTHS = (9, 4, 7)


@pytest.fixture(scope="module")
def whole() -> Any:
    return tiny_model(FAMILY)


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    source = tiny_source(FAMILY)
    with LocalSwarm(source, spans=[(0, 2), (2, 4), (0, 4)], dtype="float32") as swarm:
        yield swarm


@pytest.fixture
def model(swarm: LocalSwarm) -> Iterator[DistributedModelForCausalLM]:
    with AutoDistributedModelForCausalLM.from_pretrained(tiny_source(FAMILY), join=swarm) as model:
        model.training_steps = TrainConfig(micro_tokens=10)
        yield model


def as_tuning(tensors: Tensors, num_blocks: int, size: int) -> tuple[Tuning, list[torch.Tensor]]:
    """The same tensors for a swarm, as leaves of their own."""
    prompts = torch.zeros(num_blocks, tensors.spec.prompt_tokens, size)
    lora: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for block in tensors.spec.blocks:
        mine = [one.detach().clone().requires_grad_() for one in tensors.blocks[block.index]]
        prompts[block.index] = mine.pop(0).detach()
        lora[block.index] = {one.target: (mine.pop(0), mine.pop(0)) for one in block.lora}
    prompts.requires_grad_()
    tuning = Tuning(prompts=prompts, lora=lora, config=tensors.spec.config, encoding="float32")
    leaves = [one for pairs in lora.values() for pair in pairs.values() for one in pair]
    return tuning, [prompts, *leaves]


def close(mine: torch.Tensor | None, theirs: torch.Tensor | None) -> None:
    assert mine is not None
    assert theirs is not None
    mine, theirs = mine.detach(), theirs.detach()
    torch.testing.assert_close(
        mine.float(), theirs.float(), rtol=1e-4, atol=1e-4 * float(theirs.abs().max())
    )


def test_inputs_prompts_and_adapters(model: DistributedModelForCausalLM, whole: Any) -> None:
    blocks, size = model.num_blocks, model.head.hidden_size
    tensors = make_tensors(whole, range(blocks))
    tuning, leaves = as_tuning(tensors, blocks, size)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(sum(LENGTHS), size, generator=generator)
    given, truth = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    mine = run_blocks(model, given, LENGTHS, Span(0, blocks), tuning)
    theirs = whole_forward(whole, truth, LENGTHS, tensors)
    close(mine, theirs)
    weights = torch.randn(theirs.shape, generator=generator)
    (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    close(given.grad, truth.grad)
    prompts = torch.stack([_grad(tensors.blocks[index][0]) for index in range(blocks)])
    close(leaves[0].grad, prompts)
    expected = [one for index in range(blocks) for one in tensors.blocks[index][1:]]
    for one, other in zip(leaves[1:], expected, strict=True):
        close(one.grad, other.grad)


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_a_padded_batch(model: DistributedModelForCausalLM, whole: Any, side: str) -> None:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, model.vocab_size, (2, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : 3 if side == "left" else None] = 0 if side == "left" else 1
    if side == "right":
        mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, mask[1].argmax()] = -100  # what padding predicts is nobody's
    embeddings = whole.get_input_embeddings()(ids).detach()
    given, truth = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    mine = model(inputs_embeds=given, attention_mask=mask, labels=labels)
    theirs = whole(inputs_embeds=truth, attention_mask=mask, labels=labels)
    close(mine.loss, theirs.loss)
    mine.loss.backward()
    theirs.loss.backward()
    kept = mask.bool()
    assert given.grad is not None
    assert truth.grad is not None
    close(given.grad[kept], truth.grad[kept])
    assert mine.past_key_values is None


def test_own_modules_between_spans_and_accumulation(
    model: DistributedModelForCausalLM, whole: Any
) -> None:
    size = model.head.hidden_size
    torch.manual_seed(5)
    own = torch.nn.Linear(size, size)
    rows = torch.randn(2, 6, size)

    def step(batch: torch.Tensor) -> torch.Tensor:
        hidden = model.blocks[:2](batch)
        return model.blocks[2:](own(hidden)).pow(2).mean()

    step(rows).backward()
    whole_grad = own.weight.grad
    assert whole_grad is not None
    own.weight.grad = None
    for row in rows:
        (step(row[None]) / 2).backward()
    close(own.weight.grad, whole_grad)


def test_head_and_embedding_can_be_trained(model: DistributedModelForCausalLM) -> None:
    ids = torch.arange(6)[None]
    for part in model.head.modules().values():
        part.requires_grad_(True)
    embeddings = model.get_input_embeddings()(ids)
    model(inputs_embeds=embeddings, labels=ids).loss.backward()
    for name in ("embedding", "norm", "head"):
        weight = next(model.head.modules()[name].parameters())
        assert weight.grad is not None
        assert float(weight.grad.abs().sum()) > 0
        weight.grad = None
        model.head.modules()[name].requires_grad_(False)


def test_without_gradients_the_same_comes_out(model: DistributedModelForCausalLM) -> None:
    rows = torch.randn(1, 5, model.head.hidden_size)
    with torch.no_grad():
        plain = model.blocks(rows)
    assert torch.allclose(model.blocks(rows.requires_grad_()), plain, atol=1e-5)


def test_a_graph_may_be_used_twice_or_thrown_away(model: DistributedModelForCausalLM) -> None:
    rows = torch.randn(1, 5, model.head.hidden_size, requires_grad=True)
    loss = model.blocks(rows).sum()
    loss.backward(retain_graph=True)
    first = _grad(rows).clone()
    loss.backward()
    close(_grad(rows), 2 * first)
    model.blocks(rows).sum()  # nobody comes back for it


def test_dropout_is_the_same_for_any_cut(swarm: LocalSwarm, whole: Any) -> None:
    found: list[torch.Tensor] = []
    tensors = make_tensors(whole, (0, 3), dropout=0.3)
    for tokens in (5, 100):
        with AutoDistributedModelForCausalLM.from_pretrained(
            tiny_source(FAMILY), join=swarm
        ) as model:
            model.training_steps = TrainConfig(micro_tokens=tokens)
            size = model.head.hidden_size
            tuning, leaves = as_tuning(tensors, model.num_blocks, size)
            rows = torch.linspace(-1, 1, sum(LENGTHS) * size).view(-1, size)
            run_blocks(model, rows, LENGTHS, Span(0, 4), tuning).sum().backward()
            found.append(torch.cat([_grad(leaf).flatten() for leaf in leaves]))
    close(found[0], found[1])


def test_bad_input_is_refused_and_hurts_nobody(
    model: DistributedModelForCausalLM, whole: Any
) -> None:
    size, span = model.head.hidden_size, Span(0, 4)
    rows = torch.randn(6, size, requires_grad=True)
    good = run_blocks(model, rows, (6,), span)
    tensors = make_tensors(whole, (1,))
    tuning, _ = as_tuning(tensors, 4, size)
    pairs = tuning.lora[1]
    target = next(iter(pairs))
    a, b = pairs[target]
    config = tuning.config

    def with_pair(name: str, one: torch.Tensor, other: torch.Tensor) -> Tuning:
        return Tuning(lora={1: {name: (one, other)}}, config=config, encoding="float32")

    bad: list[tuple[type[Exception], str, Any]] = [
        (BadInput, "not finite", lambda: run_blocks(model, rows * float("nan"), (6,), span)),
        (BadInput, "shape", lambda: run_blocks(model, rows, (5,), span)),
        (BadInput, "rank", lambda: run_blocks(model, rows, (6,), span, with_pair(target, b, a))),
        (AdapterBad, "no linear layer",
         lambda: run_blocks(model, rows, (6,), span, with_pair("nowhere", a, b))),
        (AdapterBad, "takes",
         lambda: run_blocks(model, rows, (6,), span, with_pair(target, a[:, 1:], b))),
        (AdapterBad, "not finite",
         lambda: run_blocks(model, rows, (6,), span, with_pair(target, a / 0, b))),
        (BadInput, "in front", lambda: run_blocks(model, rows, (1, 5), span, tuning)),
    ]  # fmt: skip
    for kind, text, call in bad:
        with pytest.raises(kind, match=text):
            call()
    with pytest.raises(BadInput, match="not finite"):
        (good * float("inf")).sum().backward()
    again = run_blocks(model, rows, (6,), span)
    assert torch.equal(again, good)
