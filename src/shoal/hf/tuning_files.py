"""What was learned, in a folder: prompts and heads for classes as peft has them.

A prompt is peft's PROMPT_TUNING, with a head for classes its SEQ_CLS task: plain
transformers + peft load the folder. What peft has no form for is our own: deep prompts
(`SHOAL_DEEP_PROMPT`) and heads without a prompt (`SHOAL_CLASSES`). `shoal.json` beside them
names the model and the classes; docs/finetuning.md specifies it. LoRA is in docs/adapters.md.
Shapes: P positions of a prompt, L blocks, D hidden size, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from shoal.base.errors import ConfigError
from shoal.hf.saved_session import read_file, write_file
from shoal.hf.tuning_checkpoint import read_whole
from shoal.hf.tuning_methods import PROMPT_TOKENS_MAX, ClassHead, DeepPromptTuning, PromptTuning
from shoal.hf.tuning_model import TunedModel
from shoal.model.adapter_files import write_peft
from shoal.model.adapter_tensors import adapter_of

CONFIG: Final = "adapter_config.json"
TENSORS: Final = "adapter_model.safetensors"
NOTE: Final = "shoal.json"
FORMAT: Final = "shoal-learned-1"

TENSOR_BYTES_MAX: Final = 8 << 30
"""A deep prompt of 4,096 positions for 40 blocks of 8,192 in float32 has 5 GiB."""

TEXT_BYTES_MAX: Final = 1 << 20

_PROMPT: Final = "prompt_embeddings"
_ADDITIONS: Final = "deep_prompts"
_CLASSES: Final = "base_model.score.weight"
KINDS: Final = {
    "PROMPT_TUNING": "a prompt",
    "SHOAL_DEEP_PROMPT": "deep prompts",
    "SHOAL_CLASSES": "a head for classes",
}
"""What `learned_kind` may say but LoRA, and what people call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What a folder holds; what it does not hold is None."""

    model: str
    """Hash of the model that it was learned for; empty where the folder does not say."""
    prompt: torch.Tensor | None = None
    """(P, D) float32."""
    additions: torch.Tensor | None = None
    """(L - 1, P, D) float32: what is added to the prompt's positions before blocks 1, 2, ..."""
    classes: torch.Tensor | None = None
    """(C, D) float32."""
    label_names: tuple[str, ...] = ()

    def modules(self) -> tuple[PromptTuning | None, ClassHead | None]:
        """The same as torch modules, to go on learning or to run."""
        prompt: PromptTuning | None = None
        if self.prompt is not None and self.additions is not None:
            deep = DeepPromptTuning(self.prompt, len(self.additions) + 1)
            deep.additions.data.copy_(self.additions)
            prompt = deep
        elif self.prompt is not None:
            prompt = PromptTuning(self.prompt)
        head: ClassHead | None = None
        if self.classes is not None:
            head = ClassHead(
                int(self.classes.shape[0]), int(self.classes.shape[1]), torch.Generator()
            )
            head.weight.data.copy_(self.classes)
        return prompt, head


def write_learned(folder: Path, learned: Learned, config: Any, given: str) -> None:
    """Write a folder. `config` is the model's, `given` how people name the model.

    Raises:
        ConfigError: it can't be written.
    """
    tensors = {
        name: value.detach().float().cpu().contiguous()
        for name, value in (
            (_PROMPT, learned.prompt),
            (_ADDITIONS, learned.additions),
            (_CLASSES, learned.classes),
        )
        if value is not None
    }
    note = {
        "format": FORMAT,
        "model": learned.model,
        "given": given,
        "label_names": list(learned.label_names),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"can't make the folder {folder}: {error.strerror}") from error
    write_file(folder / TENSORS, save(tensors))
    write_file(folder / CONFIG, _json(_peft_config(learned, config, given)))
    write_file(folder / NOTE, _json(note))


def read_learned(folder: Path) -> Learned:
    """What a folder holds; also one that peft saved.

    Raises:
        ConfigError: no such folder, another kind of adapter, or altered files.
    """
    kind = learned_kind(folder)
    if kind not in KINDS:
        raise ConfigError(f"{folder} holds a {kind} adapter, not prompts or a head for classes")
    try:
        tensors = load(read_whole(folder / TENSORS, TENSOR_BYTES_MAX))
        note = {}
        if (folder / NOTE).exists():
            note = json.loads(read_file(folder / NOTE, TEXT_BYTES_MAX))
        return _learned(kind, tensors, note)
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"{folder} is not what shoal finetune or peft saves: {error}") from error


def learned_kind(folder: Path) -> str:
    """`LORA`, `PROMPT_TUNING` and the like, as `adapter_config.json` says.

    Raises:
        ConfigError: no such folder, or no adapter.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no adapter: there is no {CONFIG}")
    try:
        config = json.loads(read_file(folder / CONFIG, TEXT_BYTES_MAX))
        return str(config["peft_type"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{folder / CONFIG} is no description of an adapter: {error}") from error


def check_fits(learned: Learned, *, model: str, hidden_size: int, num_blocks: int) -> None:
    """See that it was learned for this model.

    Raises:
        ConfigError: it was not.
    """
    if learned.model and learned.model != model:
        raise ConfigError(
            f"the adapter was learned for model {learned.model}, this is {model}: give the model "
            "that it belongs to"
        )
    for value in (learned.prompt, learned.additions, learned.classes):
        if value is not None and value.shape[-1] != hidden_size:
            raise ConfigError(
                f"the adapter is for a model {value.shape[-1]} wide, this one is {hidden_size} wide"
            )
    if learned.additions is not None and len(learned.additions) != max(1, num_blocks - 1):
        raise ConfigError(
            f"the adapter is for {len(learned.additions) + 1} blocks, the model has {num_blocks}"
        )


def _learned(kind: str, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> Learned:
    names = note.get("label_names", [])
    if note and note.get("format") != FORMAT:
        raise ValueError(f"{NOTE} has the format {note.get('format')!r}, not {FORMAT!r}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{NOTE} has label_names that are no list of texts")
    unknown = tensors.keys() - {_PROMPT, _ADDITIONS, _CLASSES}
    if unknown:
        raise ValueError(f"the tensor {min(unknown)} is not known")
    prompt = _checked(tensors, _PROMPT, 2) if kind != "SHOAL_CLASSES" else None
    additions = _checked(tensors, _ADDITIONS, 3) if kind == "SHOAL_DEEP_PROMPT" else None
    if prompt is not None and not 1 <= len(prompt) <= PROMPT_TOKENS_MAX:
        raise ValueError(f"a prompt of {len(prompt)} positions")
    if prompt is not None and additions is not None and additions.shape[1:] != prompt.shape:
        raise ValueError("prompt and additions of different shapes")
    classes = None
    if kind == "SHOAL_CLASSES" or _CLASSES in tensors:
        classes = _checked(tensors, _CLASSES, 2)
        names = names or [str(number) for number in range(len(classes))]
        if len(names) != len(classes):
            raise ValueError(f"{len(classes)} classes with {len(names)} names")
    return Learned(
        model=str(note.get("model", "")),
        prompt=prompt,
        additions=additions,
        classes=classes,
        label_names=tuple(names),
    )


def _checked(tensors: Mapping[str, torch.Tensor], name: str, dimensions: int) -> torch.Tensor:
    value = tensors[name]
    if value.dim() != dimensions or not value.numel() or not value.dtype.is_floating_point:
        raise ValueError(f"{name} has the shape {tuple(value.shape)} and type {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds values that are not finite")
    return value.float()


def _peft_config(learned: Learned, config: Any, given: str) -> dict[str, Any]:
    """As peft writes it; its own kinds load there."""
    kind = "SHOAL_DEEP_PROMPT" if learned.additions is not None else "PROMPT_TUNING"
    if learned.prompt is None:
        kind = "SHOAL_CLASSES"
    is_classes = learned.classes is not None
    return {
        "peft_type": kind,
        "task_type": "SEQ_CLS" if is_classes else "CAUSAL_LM",
        "base_model_name_or_path": given,
        "inference_mode": True,
        "modules_to_save": ["classifier", "score"] if is_classes else None,
        "num_attention_heads": int(getattr(config, "num_attention_heads", 1)),
        "num_layers": int(config.num_hidden_layers),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": 0 if learned.prompt is None else len(learned.prompt),
        "token_dim": int(config.hidden_size),
        "prompt_tuning_init": "RANDOM",
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_result(
    folder: Path, model: TunedModel, *, config: Any, given: str, label_names: tuple[str, ...]
) -> None:
    """Write what a model has learned: LoRA as peft does, anything else as `write_learned`.

    Raises:
        ConfigError: it can't be written.
    """
    if model.lora is not None:
        adapter = adapter_of(model.lora.config, "float32", model.lora.pairs())
        try:
            write_peft(folder, adapter, config, given)
        except OSError as error:
            raise ConfigError(f"can't write to {folder}: {error}") from error
        return
    additions = None
    if isinstance(model.prompt, DeepPromptTuning):
        additions = model.prompt.additions
    learned = Learned(
        model=model.base.model_name,
        prompt=None if model.prompt is None else model.prompt.prompt,
        additions=additions,
        classes=None if model.classes is None else model.classes.weight,
        label_names=label_names,
    )
    write_learned(folder, learned, config, given)
