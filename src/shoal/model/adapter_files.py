"""Adapters as PEFT stores them: a directory with adapter_config.json and safetensors.

Read is plain LoRA on linear layers inside blocks, which is what nearly all published adapters
are. What we can't do as PEFT would is refused by the name of its option, never left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from shoal.base.adapters import AdapterConfig, AdapterEncoding, AdapterPart
from shoal.base.errors import AdapterBad
from shoal.model.adapter_tensors import adapter_of, pairs_of
from shoal.model.lora import LoraPair
from shoal.model.parts import Parts, meta_model

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
PICKLED_FILE: Final = "adapter_model.bin"

_CONFIG_BYTES_MAX: Final = 1 << 20
"""Real ones have 1 kB, a few 10 where targets are listed one by one."""

_PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of the model's modules."""

_KNOWN: Final = frozenset(
    {
        # Read, or without meaning for the numbers.
        "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "megatron_core", "qalora_group_size", "fan_in_fan_out",
        # Which layers have tensors is seen from the tensors.
        "exclude_modules", "layers_to_transform", "layers_pattern",
        # How training begins; the kinds that change the base model are refused by value.
        "init_lora_weights", "eva_config",
    }
)  # fmt: skip

_DEFAULTS: Final[Mapping[str, Any]] = {"bias": "none"}
"""What the other options must be, where it isn't something false."""

_HARMLESS_INITS: Final = (True, False, None, "gaussian", "orthogonal", "eva")


def read_peft(directory: Path, model_config: Any) -> AdapterPart:
    """The adapter in a directory that PEFT (or `write_peft`) has written.

    float32 and bfloat16 tensors stay as they are; float16 ones become float32.

    Raises:
        AdapterBad: missing or broken files, an option that can't be followed (by name), or
            tensors that are not LoRA of layers inside the model's blocks.
    """
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    pairs = _pairs(tensors, blocks_name(model_config))
    targets = sorted({target for layers in pairs.values() for target in layers})
    return adapter_of(
        AdapterConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            targets=tuple(targets),
            dropout=config.get("lora_dropout") or 0.0,
            use_rslora=bool(config.get("use_rslora")),
        ),
        _encoding(tensors),
        pairs,
    )


def write_peft(directory: Path, adapter: AdapterPart, model_config: Any, base_model: str) -> None:
    """Write a whole adapter so that PEFT reads it. Makes the directory.

    Each file is replaced as a whole, the weights first: what was there before is lost to no
    failure amid it.
    `base_model` is what PEFT shall load as the base: a directory or a hub id.
    """
    directory.mkdir(parents=True, exist_ok=True)
    parts = Parts(meta_model(model_config, torch.float32))
    prefix = parts.blocks_name
    tensors: dict[str, torch.Tensor] = {}
    for index, layers in pairs_of(adapter).items():
        for target, pair in layers.items():
            name = f"{_PREFIX}{prefix}.{index}.{target}"
            tensors[f"{name}.lora_A.weight"] = pair.a.contiguous()
            tensors[f"{name}.lora_B.weight"] = pair.b.contiguous()
    _replace(
        directory / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"})
    )
    config = _config(adapter, parts, base_model)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    _replace(directory / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    partial = path.with_name(f".partial-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_peft_directory(directory: Path) -> bool:
    """Whether it holds an adapter, good or bad."""
    return (directory / CONFIG_FILE).is_file()


def blocks_name(model_config: Any) -> str:
    """Where a model's blocks are in transformers' model object: `model.layers`."""
    return Parts(meta_model(model_config, torch.float32)).blocks_name


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        with path.open("rb") as file:
            text = file.read(_CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise AdapterBad(f"{directory} holds no adapter: no {CONFIG_FILE} ({error})") from error
    if len(text) > _CONFIG_BYTES_MAX:
        raise AdapterBad(f"{path} is larger than {_CONFIG_BYTES_MAX} bytes")
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterBad(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterBad(f"{path} is no JSON object")
    _check_options(config)
    return config


def _check_options(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterBad(f"peft_type {kind!r:.40}: only LORA adapters can be used here")
    for option in ("r", "lora_alpha"):
        if option not in config:
            raise AdapterBad(f"{CONFIG_FILE} has no {option}")
    if config.get("init_lora_weights") not in _HARMLESS_INITS:
        raise AdapterBad(
            f"init_lora_weights {config['init_lora_weights']!r:.40} changes the base model: "
            "convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    for option, value in sorted(config.items()):
        if option in _KNOWN or not value or value == _DEFAULTS.get(option):
            continue
        raise AdapterBad(
            f"option {option}={json.dumps(value)[:80]} is not supported: only plain LoRA on linear "
            "layers inside blocks is"
        )


def _read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        if (directory / PICKLED_FILE).is_file():
            raise AdapterBad(
                f"{directory / PICKLED_FILE} is a pickle, which is never read: save it as "
                f"{WEIGHTS_FILE} (PEFT: save_pretrained(..., safe_serialization=True))"
            )
        raise AdapterBad(f"{directory} holds no {WEIGHTS_FILE}")
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterBad(f"{path} is broken: {error}") from error
    return tensors


def _pairs(tensors: dict[str, torch.Tensor], prefix: str) -> dict[int, dict[str, LoraPair]]:
    name_of = re.compile(
        re.escape(_PREFIX + prefix) + r"\.(\d{1,5})\.(.+)\.lora_(A|B)(\.default)?\.weight"
    )
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = name_of.fullmatch(name)
        if match is None:
            raise AdapterBad(
                f"tensor {name!r:.200} is no LoRA of a layer inside the model's blocks "
                f"({_PREFIX}{prefix}.N.LAYER.lora_A.weight)"
            )
        found.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    if not found:
        raise AdapterBad(f"{WEIGHTS_FILE} holds no tensors")
    pairs: dict[int, dict[str, LoraPair]] = {}
    for (index, target), both in sorted(found.items()):
        if set(both) != {"A", "B"}:
            raise AdapterBad(f"block {index}: {target} has lora_{''.join(both)} only")
        pairs.setdefault(index, {})[target] = LoraPair(both["A"], both["B"])
    return pairs


def _encoding(tensors: dict[str, torch.Tensor]) -> AdapterEncoding:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    unknown = dtypes - {torch.float32, torch.float16, torch.bfloat16}
    if unknown:
        raise AdapterBad(f"tensors of type {unknown.pop()}: float32, bfloat16 or float16 are read")
    return "bfloat16" if dtypes == {torch.bfloat16} else "float32"


def _config(adapter: AdapterPart, parts: Parts, base_model: str) -> dict[str, Any]:
    config = adapter.manifest.config
    first = parts.blocks[0]
    layers = dict(first.named_modules())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layers.get(t), Conv1D) for t in config.targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "r": config.rank,
        "target_modules": _target_modules(adapter, parts),
        "use_rslora": config.use_rslora,
    }


def _target_modules(adapter: AdapterPart, parts: Parts) -> Sequence[str]:
    """Paths inside blocks, or all layers one by one where blocks differ."""
    manifest = adapter.manifest
    targets = manifest.config.targets
    is_whole = len(manifest.blocks) == len(parts.blocks)
    if is_whole and all(len(block.shapes) == len(targets) for block in manifest.blocks):
        return list(targets)
    return [
        f"{parts.blocks_name}.{block.index}.{shape.target}"
        for block in manifest.blocks
        for shape in block.shapes
    ]
