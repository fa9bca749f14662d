"""What a person asks for, as modules: the methods of `shoal finetune`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch

from shoal.base.adapters import AdapterConfig
from shoal.base.errors import AdapterBad, ConfigError
from shoal.hf.tuning_base import TuningBase
from shoal.hf.tuning_methods import (
    ClassHead,
    DeepPromptTuning,
    Lora,
    PromptTuning,
    check_deep_length,
    prompt_from_tokens,
)
from shoal.hf.tuning_model import TunedModel

MethodName = Literal["lora", "prompt", "deep-prompt", "classifier"]

LEARNING_RATES: Final[Mapping[str, float]] = {
    "lora": 1e-3,
    "prompt": 1e-2,
    "deep-prompt": 1e-2,
    "classifier": 3e-3,
}
"""Unless told otherwise. Larger models want less; what the demo model did: docs/finetuning.md."""

QUERY_AND_VALUE: Final = {"q_proj", "v_proj", "query_key_value", "qkv_proj", "c_attn", "Wqkv"}
"""Layers that take LoRA unless told otherwise, by the last part of their path: peft's choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What to learn; options of other methods are of no effect.

    Raises:
        ConfigError: no such method, or a number that cannot be.
    """

    name: MethodName
    prompt_tokens: int = 16
    """Positions of the prompt; for a classifier 0 means its head alone."""
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    """Layers that take LoRA: paths in a block or their ends; none: `QUERY_AND_VALUE`."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank), as an adapter does that training begins at."""

    def __post_init__(self) -> None:
        if self.name not in get_args(MethodName):
            raise ConfigError(f"--method {self.name}: one of {', '.join(get_args(MethodName))}")
        fewest = 0 if self.name == "classifier" else 1
        if self.name != "lora" and self.prompt_tokens < fewest:
            raise ConfigError(f"--prompt-tokens {self.prompt_tokens}: at least {fewest}")
        if self.name == "deep-prompt":
            check_deep_length(self.prompt_tokens)


def build(base: TuningBase, method: Method, *, num_classes: int, seed: int) -> TunedModel:
    """The modules of a method at their beginning, drawn from `seed`.

    Raises:
        ConfigError: a target that no block has, a number that cannot be.
    """
    generator = torch.Generator().manual_seed(seed)
    if method.name == "lora":
        return TunedModel(base, lora=_lora(base, method, generator))
    prompt: PromptTuning | None = None
    if method.prompt_tokens:
        values = prompt_from_tokens(base.token_table(), method.prompt_tokens, generator)
        is_deep = method.name == "deep-prompt"
        prompt = DeepPromptTuning(values, base.num_blocks) if is_deep else PromptTuning(values)
    if method.name != "classifier":
        return TunedModel(base, prompt=prompt)
    head = ClassHead(num_classes, base.hidden_size, generator)
    return TunedModel(base, prompt=prompt, classes=head)


def _lora(base: TuningBase, method: Method, generator: torch.Generator) -> Lora:
    layers = base.linear_layers()
    try:
        config = AdapterConfig(
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
            use_rslora=method.use_rslora,
            targets=_targets(layers, base.stacked_weights(), method.targets),
        )
    except AdapterBad as error:
        # It begins with the option's name.
        raise ConfigError(f"--{error.detail}") from error
    return Lora(config, layers, generator)


def _targets(
    layers: Mapping[int, Mapping[str, tuple[int, int]]],
    stacked: tuple[str, ...],
    wanted: tuple[str, ...],
) -> tuple[str, ...]:
    """Paths that the wanted names stand for.

    Raises:
        ConfigError: a name that no layer has; names those there are.
    """
    known = sorted({target for block in layers.values() for target in block})
    if not wanted:
        usual = [target for target in known if target.rpartition(".")[2] in QUERY_AND_VALUE]
        return tuple(usual or known)
    found: set[str] = set()
    for name in wanted:
        matching = _named(name, known)
        if not matching:
            why = f"--targets {name}: no linear layer of the blocks is called so"
            if experts := _named(name, stacked):
                why = f"--targets {name}: {experts[0]} has the weights of all experts in one tensor"
            raise ConfigError(f"{why}; LoRA goes to {', '.join(known)}")
        found.update(matching)
    return tuple(sorted(found))


def _named(name: str, paths: Iterable[str]) -> list[str]:
    """The paths that a name stands for: itself, or those that end with it."""
    return [one for one in paths if one == name or one.endswith(f".{name}")]
