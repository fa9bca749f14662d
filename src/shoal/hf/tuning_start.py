"""Training that begins at what was learned before, here or by peft: its values are the first ones.

Shapes: A (rank, inputs), B (outputs, rank) of LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from shoal.base.adapters import AdapterPart
from shoal.base.errors import AdapterBad, ConfigError
from shoal.hf.tuning_build import Method, MethodName
from shoal.hf.tuning_files import Learned, check_fits, learned_kind, read_learned
from shoal.hf.tuning_methods import Lora
from shoal.hf.tuning_model import TunedModel
from shoal.model.adapter_files import read_peft
from shoal.model.adapter_tensors import pairs_of
from shoal.model.lora import targets_of
from shoal.model.parts import Parts, meta_model

LORA: Final = "LORA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a folder holds, and the method that goes on with it."""

    folder: Path
    method: Method
    lora: AdapterPart | None = None
    learned: Learned | None = None

    def check_labels(self, names: tuple[str, ...]) -> None:
        """See that the data has the classes that the head tells.

        Raises:
            ConfigError: it has others.
        """
        told = () if self.learned is None else self.learned.label_names
        if self.method.name == "classifier" and names != told:
            raise ConfigError(
                f"{self.folder} tells {', '.join(told)}, the data has {', '.join(names)}: begin "
                "without --from-adapter"
            )

    def put_into(self, model: TunedModel) -> None:
        """Give a model of the same method its first values.

        Raises:
            ConfigError: learned for another model.
        """
        with torch.no_grad():
            if self.lora is not None and model.lora is not None:
                _put_lora(self.lora, model.lora, self.folder)
            if self.learned is None:
                return
            check_fits(
                self.learned, model=model.base.model_name, hidden_size=model.base.hidden_size,
                num_blocks=model.base.num_blocks,
            )  # fmt: skip
            prompt, classes = self.learned.modules()
            for mine, theirs in ((model.prompt, prompt), (model.classes, classes)):
                if mine is not None and theirs is not None:
                    mine.load_state_dict(theirs.state_dict())


def read_start(folder: Path, asked: Method, model_config: Any) -> Start:
    """What to begin at. Of `asked` remains what the folder doesn't say: dropout.

    Raises:
        ConfigError: no adapter, one of another kind or for other layers, or altered files.
    """
    if learned_kind(folder) == LORA:
        try:
            adapter = read_peft(folder, model_config)
        except AdapterBad as error:
            raise ConfigError(f"--from-adapter {folder}: {error.detail}") from error
        _check_layers(adapter, model_config, folder)
        config = adapter.manifest.config
        method = replace(
            asked, name="lora", rank=config.rank, alpha=config.alpha, targets=config.targets,
            use_rslora=config.use_rslora,
        )  # fmt: skip
        return Start(folder=folder, method=method, lora=adapter)
    learned = read_learned(folder)
    name: MethodName = "prompt"
    if learned.classes is not None:
        name = "classifier"
    elif learned.additions is not None:
        name = "deep-prompt"
    count = 0 if learned.prompt is None else len(learned.prompt)
    return Start(
        folder=folder, method=replace(asked, name=name, prompt_tokens=count), learned=learned
    )


def _check_layers(adapter: AdapterPart, model_config: Any, folder: Path) -> None:
    blocks = Parts(meta_model(model_config, torch.float32)).blocks
    for block in adapter.manifest.blocks:
        sizes = targets_of(blocks[block.index]) if block.index < len(blocks) else {}
        for shape in block.shapes:
            if sizes.get(shape.target) != (shape.inputs, shape.outputs):
                raise _for_another(folder, block.index, shape.target)


def _for_another(folder: Path, block: int, target: str) -> ConfigError:
    return ConfigError(
        f"{folder} is for another model: {target} of block {block} is not there, or of another size"
    )


def _put_lora(adapter: AdapterPart, lora: Lora, folder: Path) -> None:
    """Layers that the adapter has nothing for keep the values that change nothing (B is 0)."""
    mine = lora.pairs()
    for block, layers in pairs_of(adapter).items():
        for target, given in layers.items():
            pair = mine.get(block, {}).get(target)
            if pair is None or (pair.a.shape, pair.b.shape) != (given.a.shape, given.b.shape):
                raise _for_another(folder, block, target)
            pair.a.copy_(given.a)
            pair.b.copy_(given.b)
