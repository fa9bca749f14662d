"""What tests of tuning share: a tokenizer of letters, small data, whole models."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shoal.hf.tuning_build import Method, build
from shoal.hf.tuning_examples import Example, Prepared
from shoal.hf.tuning_model import TunedModel
from shoal.hf.tuning_whole import WholeBase, load_whole
from tests.models import VOCABULARY, tiny_source

END = "~"

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)

LORA_LAYERS = ("q_proj", "v_proj", "down_proj")

METHODS = {
    "prompt": Method(name="prompt", prompt_tokens=5),
    "deep-prompt": Method(name="deep-prompt", prompt_tokens=3),
    "lora": Method(name="lora", rank=4, alpha=8.0, targets=LORA_LAYERS, dropout=0.1),
    "classifier": Method(name="classifier", prompt_tokens=4),
    "head": Method(name="classifier", prompt_tokens=0),
}


def letters() -> Any:
    """A tokenizer whose tokens are the printable characters; ~ ends a text."""
    vocabulary = {chr(32 + index): index for index in range(VOCABULARY - 1)}
    vocabulary["<unk>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=END)


def whole_base(family: str = "llama") -> WholeBase:
    """A tiny model in this process."""
    return load_whole(tiny_source(family), "tiny")


def tiny_model_of(method: str, base: WholeBase | None = None, *, seed: int = 1) -> TunedModel:
    """Something to learn."""
    return build(base or whole_base(), METHODS[method], num_classes=3, seed=seed)


def shaken(model: TunedModel, seed: int = 5) -> TunedModel:
    """All that is learned off its beginning, where much of it is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.05)
    return model


def tiny_examples(count: int = 12, seed: int = 2) -> Prepared:
    """Texts of 4 to 12 tokens that count up, and a class for each."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        start, length = (int(at) for at in torch.randint(4, 13, (2,), generator=generator))
        ids = tuple(start + at for at in range(length))
        learned = tuple(at >= length // 3 for at in range(length))
        examples.append(Example(ids=ids, is_learned=learned, label=number % 3))
    return Prepared(examples=tuple(examples), num_cut=0, num_left_out=0)
