"""What is learned, beside peft on transformers' own models: losses, gradients, files.

The whole model in one process is the base here; that a swarm gives the same is tested in
`test_tuning_swarm.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForSequenceClassification

from shoal.base.errors import BadInput, ConfigError
from shoal.hf.tuning_examples import Batch, make_batch
from shoal.hf.tuning_files import (
    CONFIG,
    NOTE,
    TENSORS,
    Learned,
    check_fits,
    read_learned,
    write_learned,
    write_result,
)
from shoal.hf.tuning_forward import TunedForward
from shoal.hf.tuning_model import TunedModel
from tests.models import tiny_config, tiny_model
from tests.tuning_cases import shaken, tiny_examples, tiny_model_of, whole_base

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FAMILIES = ("llama", "gpt2", "gemma", "bloom", "opt")
"""Plain, learned positions, a factor on embeddings, a norm on embeddings, positions with an
offset."""


def batch_of(count: int = 3, *, is_classes: bool = False) -> Batch:
    return make_batch(tiny_examples(count).examples, is_classes=is_classes)


def mask_of(batch: Batch) -> torch.Tensor:
    columns = torch.arange(batch.ids.shape[1])[None]
    return (columns < torch.tensor(batch.lengths)[:, None]).long()


def mean_and_grads(model: TunedModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(batch)
    (loss.total / loss.num_counted).backward()
    grads = {name: value.grad for name, value in model.named_parameters()}
    return float(loss.total.detach()) / loss.num_counted, {
        k: v for k, v in grads.items() if v is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_tuning_is_pefts(family: str) -> None:
    model = tiny_model_of("prompt", whole_base(family))
    batch = batch_of()
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs: Any = get_peft_model(tiny_model(family), config)
    prompt = theirs.prompt_encoder["default"].embedding.weight
    prompt.data.copy_(model.prompt.prompt)
    expected = theirs(input_ids=batch.ids, attention_mask=mask_of(batch), labels=batch.labels)
    expected.loss.backward()
    loss, grads = mean_and_grads(model, batch)
    assert loss == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    torch.testing.assert_close(grads["prompt.prompt"], prompt.grad, rtol=1e-4, atol=1e-6)


def test_lora_is_pefts() -> None:
    model = shaken(tiny_model_of("lora")).eval()
    batch = batch_of()
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]
    )
    theirs: Any = get_peft_model(tiny_model("llama"), config)
    parts = dict(theirs.named_parameters())
    ours = {}
    for block, layers in model.lora.pairs().items():
        for target, pair in layers.items():
            name = f"base_model.model.model.layers.{block}.{target}"
            ours[f"{name}.lora_A.default.weight"] = pair.a
            ours[f"{name}.lora_B.default.weight"] = pair.b
    assert ours.keys() == {name for name in parts if "lora" in name}
    for name, value in ours.items():
        parts[name].data.copy_(value)
    expected = theirs(input_ids=batch.ids, attention_mask=mask_of(batch), labels=batch.labels)
    expected.loss.backward()
    loss, _ = mean_and_grads(model, batch)
    assert loss == pytest.approx(float(expected.loss.detach()), rel=1e-5)
    for name, value in ours.items():
        torch.testing.assert_close(value.grad, parts[name].grad, rtol=1e-4, atol=1e-6)


def test_a_saved_prompt_runs_in_peft(tmp_path: Path) -> None:
    model = shaken(tiny_model_of("prompt"))
    write_result(tmp_path, model, config=tiny_config("llama"), given="tiny", label_names=())
    theirs: Any = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    batch = batch_of(1)
    expected = theirs(input_ids=batch.ids, attention_mask=mask_of(batch)).logits[:, 5:]
    torch.testing.assert_close(
        model.logits(batch.ids, batch.lengths), expected, rtol=1e-4, atol=1e-5
    )


def test_a_saved_classifier_runs_in_peft(tmp_path: Path) -> None:
    model = shaken(tiny_model_of("classifier"))
    names = ("no", "maybe", "yes")
    write_result(tmp_path, model, config=tiny_config("llama"), given="tiny", label_names=names)
    config = tiny_config("llama")
    config.num_labels, config.pad_token_id = 3, 0
    frozen = LlamaForSequenceClassification(config)
    frozen.model.load_state_dict(tiny_model("llama").model.state_dict())
    theirs: Any = PeftModel.from_pretrained(frozen, tmp_path)
    batch = batch_of(3, is_classes=True)
    for row, length in enumerate(batch.lengths):
        ids = batch.ids[row : row + 1, :length]
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(model.logits(ids, (length,)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_calls_are_those_of_transformers(side: str) -> None:
    """Padding on either side, labels that are not shifted, the loss that peft's model gives."""
    model = tiny_model_of("lora").eval()
    batch = batch_of()
    ids, labels, mask = (value.clone() for value in (batch.ids, batch.labels, mask_of(batch)))
    if side == "left":
        for row, length in enumerate(batch.lengths):
            for values in (ids, labels, mask):
                values[row] = values[row].roll(ids.shape[1] - length)
    called = TunedForward(model)
    reference = tiny_model("llama")
    expected = reference(input_ids=ids, attention_mask=mask, labels=labels)
    found = called(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    halved = called(ids, mask, labels, num_items_in_batch=2 * batch.num_counted)
    assert float(halved.loss.detach()) < float(found.loss.detach())
    with torch.no_grad():
        logits = called(input_ids=ids, attention_mask=mask).logits
    kept = mask.bool()
    torch.testing.assert_close(logits[kept], expected.logits[kept], rtol=1e-4, atol=1e-5)
    assert not bool(logits[~kept].any())


def test_calls_that_cannot_be() -> None:
    called = TunedForward(tiny_model_of("prompt"))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BadInput, match="give \\(rows, tokens\\)"):
        called(input_ids=ids[0])
    with pytest.raises(BadInput, match="labels of shape"):
        called(input_ids=ids, labels=ids[:, :2])
    with pytest.raises(BadInput, match="no label counts"):
        called(input_ids=ids, labels=torch.full_like(ids, -100))
    with pytest.raises(BadInput, match="hole"):
        called(input_ids=ids, attention_mask=torch.tensor([[1, 0, 1]]))


@pytest.mark.parametrize("method", ["prompt", "deep-prompt", "classifier", "head"])
def test_files_come_back(method: str, tmp_path: Path) -> None:
    model = shaken(tiny_model_of(method))
    config = tiny_config("llama")
    names = ("no", "maybe", "yes") if model.classes is not None else ()
    write_result(tmp_path, model, config=config, given="tiny", label_names=names)
    learned = read_learned(tmp_path)
    assert (learned.model, learned.label_names) == ("tiny", names)
    check_fits(learned, model="tiny", hidden_size=48, num_blocks=7)
    prompt, classes = learned.modules()
    again = TunedModel(model.base, prompt=prompt, classes=classes)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(again.logits(ids, (3,)), model.logits(ids, (3,)))


def test_files_that_are_no_good(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no adapter"):
        read_learned(tmp_path)
    good = Learned(model="tiny", prompt=torch.ones(2, 48))
    write_learned(tmp_path, good, tiny_config("llama"), "tiny")
    with pytest.raises(ConfigError, match="was learned for model tiny, this is other"):
        check_fits(read_learned(tmp_path), model="other", hidden_size=48, num_blocks=7)
    with pytest.raises(ConfigError, match="48 wide, this one is 64"):
        check_fits(read_learned(tmp_path), model="tiny", hidden_size=64, num_blocks=7)
    save_file({"prompt_embeddings": torch.full((2, 48), float("nan"))}, tmp_path / TENSORS)
    with pytest.raises(ConfigError, match="not finite"):
        read_learned(tmp_path)
    (tmp_path / TENSORS).write_bytes(b"\x00" * 20)
    with pytest.raises(ConfigError, match="is not what shoal finetune or peft saves"):
        read_learned(tmp_path)
    (tmp_path / NOTE).write_text('{"format": "other"}')
    with pytest.raises(ConfigError, match="is not what shoal finetune or peft saves"):
        read_learned(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="holds a LORA adapter"):
        read_learned(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(ConfigError, match="no description of an adapter"):
        read_learned(tmp_path)
