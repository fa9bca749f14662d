"""PEFT's files: read, written, and refused by the name of what can't be followed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.base.adapters import AdapterConfig, AdapterPart
from shoal.base.errors import AdapterBad
from shoal.model import adapter_files
from shoal.model.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_peft, write_peft
from shoal.model.adapter_tensors import adapter_of, pairs_of
from shoal.model.lora import LoraPair
from tests.models import tiny_config

CONFIG = tiny_config("llama")
"""7 blocks of 48 values."""

TARGETS = ("mlp.up_proj", "self_attn.q_proj")


def adapter(blocks: int = 7, *, is_even: bool = True, encoding: Any = "float32") -> AdapterPart:
    generator = torch.Generator().manual_seed(1)
    sizes = {"mlp.up_proj": 80, "self_attn.q_proj": 48}
    pairs = {
        index: {
            target: LoraPair(
                torch.randn(2, 48, generator=generator),
                torch.randn(sizes[target], 2, generator=generator),
            )
            for target in (TARGETS if is_even or index % 2 else TARGETS[:1])
        }
        for index in range(blocks)
    }
    config = AdapterConfig(rank=2, alpha=3.0, targets=TARGETS, dropout=0.1, use_rslora=True)
    return adapter_of(config, encoding, pairs)


@pytest.mark.parametrize(
    "one",
    [adapter(), adapter(3), adapter(is_even=False), adapter(encoding="bfloat16")],
    ids=["all", "some", "uneven", "bfloat16"],
)
def test_what_is_written_is_read_again(one: AdapterPart, tmp_path: Path) -> None:
    write_peft(tmp_path / "new" / "place", one, CONFIG, "base")
    back = read_peft(tmp_path / "new" / "place", CONFIG)
    assert back.manifest == one.manifest
    assert {k: bytes(v) for k, v in back.blocks.items()} == one.blocks
    pairs = pairs_of(back)
    assert pairs[0]["mlp.up_proj"].b.shape == (80, 2)


def test_what_fails_amid_writing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_peft(tmp_path, adapter(3), CONFIG, "base")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files, "save_file", half)
    with pytest.raises(OSError, match="No space"):
        write_peft(tmp_path, adapter(), CONFIG, "base")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_target_modules_as_peft_means_them(tmp_path: Path) -> None:
    write_peft(tmp_path, adapter(), CONFIG, "base")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"] == list(TARGETS)
    write_peft(tmp_path, adapter(2), CONFIG, "base")
    listed = json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"]
    assert listed[0] == "model.layers.0.mlp.up_proj"
    assert len(listed) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"from_the_future": {"a": 1}}, "from_the_future"),
        ({"r": 3}, "rank 2 in A"),
        ({"r": "2"}, "rank"),
        ({"r": 0}, "rank"),
        ({"lora_alpha": -1}, "alpha"),
        ({"lora_alpha": "x"}, "alpha"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_cannot_be_followed(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_peft(tmp_path, adapter(), CONFIG, "base")
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | options
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(AdapterBad, match=said):
        read_peft(tmp_path, CONFIG)


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def act(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return act


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(new, tensors.pop(old))


Q = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(Q), "lora_B only"),
        (changed(Q, lambda a: a[:1]), "rank 1 in A"),
        (changed(Q, lambda a: a[None]), "matrices"),
        (changed(Q, lambda a: a * float("nan")), "not finite"),
        (changed(Q, lambda a: a.to(torch.int32)), "int32"),
        (renamed(Q, "base_model.model.lm_head.lora_A.weight"), "lm_head"),
        (renamed(Q, Q.replace("lora_A", "lora_embedding_A")), "lora_embedding_A"),
        (renamed(Q, Q.replace("lora_A.weight", "lora_magnitude_vector")), "magnitude"),
        (renamed(Q, Q.replace("model.layers", "transformer.h")), "transformer.h"),
        (lambda tensors: tensors.clear(), "no tensors"),
    ],
)
def test_tensors_that_cannot_be(change: Any, said: str, tmp_path: Path) -> None:
    write_peft(tmp_path, adapter(), CONFIG, "base")
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    with pytest.raises(AdapterBad, match=said):
        read_peft(tmp_path, CONFIG)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(AdapterBad, match="holds no adapter"):
        read_peft(tmp_path, CONFIG)
    write_peft(tmp_path, adapter(), CONFIG, "base")
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterBad, match="broken"):
        read_peft(tmp_path, CONFIG)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterBad, match="pickle"):
        read_peft(tmp_path, CONFIG)
    for text in ("", "[]", "{", "[" * 100_000, " " * (1 << 20) + "{}"):
        (tmp_path / CONFIG_FILE).write_text(text)
        with pytest.raises(AdapterBad):
            read_peft(tmp_path, CONFIG)
