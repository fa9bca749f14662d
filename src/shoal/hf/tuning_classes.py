"""`AutoDistributedModelForSequenceClassification`: telling classes with a frozen swarm.

Blocks are at the servers; the head that is trained, and a prompt if one is wanted, are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.base.errors import ConfigError
from shoal.hf.auto import PATIENCE_S, AutoDistributedModelForCausalLM
from shoal.hf.connection import Place
from shoal.hf.model import DistributedModelForCausalLM
from shoal.hf.tuning_base import TuningBase
from shoal.hf.tuning_build import Method, build
from shoal.hf.tuning_files import check_fits, read_learned, write_result
from shoal.hf.tuning_forward import TunedForward
from shoal.hf.tuning_model import TunedModel
from shoal.hf.tuning_swarm import SwarmBase
from shoal.model.source import ModelSource


class DistributedModelForSequenceClassification(TunedForward):
    """A head for classes on a swarm's model, and a prompt before every text. A context manager.

    Its parameters are what is trained: give them to any torch optimiser, or the model to
    `transformers.Trainer`.
    """

    def __init__(
        self,
        tuned: TunedModel,
        label_names: tuple[str, ...],
        model: DistributedModelForCausalLM | None,
        config: Any,
    ) -> None:
        super().__init__(tuned)
        self.label_names = label_names
        self.frozen_config = config
        # In a tuple: torch would take the frozen model for something to train.
        self._model = (model,)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's files."""
        if self._model[0] is None:
            raise ConfigError("this model was made without files")
        return self._model[0].tokenizer

    @torch.no_grad()
    def tell(self, texts: list[str], tokenizer: Any | None = None) -> list[str]:
        """The likeliest class of each text.

        Raises:
            BadInput: an empty text.
            NoRouteError, PeerError: the swarm could not do it.
        """
        coder = self.tokenizer if tokenizer is None else tokenizer
        rows = [coder(text)["input_ids"] for text in texts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        self.eval()
        scores = self.tuned.logits(ids, tuple(map(len, rows)))
        return [self.label_names[int(at)] for at in scores.argmax(dim=1)]

    def save_pretrained(self, folder: str | Path, given: str = "") -> None:
        """Write what was learned: with a prompt a folder that peft loads (SEQ_CLS).

        `given` is what peft shall load as the base: a directory or a hub id.

        Raises:
            ConfigError: it can't be written.
        """
        write_result(
            Path(folder), self.tuned, config=self.frozen_config, given=given,
            label_names=self.label_names,
        )  # fmt: skip

    def close(self) -> None:
        """Leave the swarm. Idempotent."""
        if self._model[0] is not None:
            self._model[0].close()

    def __enter__(self) -> DistributedModelForSequenceClassification:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class AutoDistributedModelForSequenceClassification:
    """Not for instances: `from_pretrained` gives a `DistributedModelForSequenceClassification`."""

    def __init__(self) -> None:
        raise ConfigError(
            "call AutoDistributedModelForSequenceClassification.from_pretrained(MODEL, join=...)"
        )

    @staticmethod
    def from_pretrained(
        model: str | Path | ModelSource,
        *,
        join: str | Sequence[str] | Place,
        label_names: tuple[str, ...] | list[str] = (),
        prompt_tokens: int = 0,
        learned: str | Path | None = None,
        seed: int = 0,
        swarm: str | None = None,
        invite: str | None = None,
        dtype: str | torch.dtype = "auto",
        patience_s: float = PATIENCE_S,
        cache_dir: str | Path | None = None,
    ) -> DistributedModelForSequenceClassification:
        """Join a swarm, with a head to train or with one that was.

        Args:
            model, join, swarm, invite, dtype, patience_s, cache_dir: as for
                `AutoDistributedModelForCausalLM`.
            label_names: the classes, at least two; of no use with `learned`.
            prompt_tokens: length of the prompt that is trained with the head.
            learned: a folder that `save_pretrained`, `shoal finetune` or peft wrote.
            seed: of what training begins with.

        Raises:
            ConfigError: a wrong argument, or what was learned is not for this model.
            ModelError, NoRouteError, PeerError: as `AutoDistributedModelForCausalLM`.
        """
        if learned is None and len(label_names) < 2:
            raise ConfigError("label_names: give at least two classes, or learned=FOLDER")
        opened = AutoDistributedModelForCausalLM.from_pretrained(
            model, join=join, swarm=swarm, invite=invite, dtype=dtype, patience_s=patience_s,
            cache_dir=cache_dir,
        )  # fmt: skip
        try:
            base = SwarmBase(opened)
            if learned is None:
                method = Method(name="classifier", prompt_tokens=prompt_tokens)
                tuned = build(base, method, num_classes=len(label_names), seed=seed)
                names = tuple(label_names)
            else:
                tuned, names = _learned(base, Path(learned))
        except BaseException:
            opened.close()
            raise
        return DistributedModelForSequenceClassification(tuned, names, opened, opened.config)


def _learned(base: TuningBase, folder: Path) -> tuple[TunedModel, tuple[str, ...]]:
    found = read_learned(folder)
    check_fits(
        found, model=base.model_name, hidden_size=base.hidden_size, num_blocks=base.num_blocks
    )
    prompt, classes = found.modules()
    if classes is None:
        raise ConfigError(f"{folder} holds a prompt but no head for classes")
    return TunedModel(base, prompt=prompt, classes=classes), found.label_names
