"""A training run in a file: parameters, the optimiser's state, what has happened so far.

One safetensors file with JSON in its header, replaced as a whole, so that a run killed at
any moment goes on from its last checkpoint with the numbers it would have had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from shoal.base.errors import ConfigError
from shoal.hf.saved_session import read_file, write_file

CHECKPOINT: Final = "checkpoint.safetensors"
"""Its name in the folder of a run."""

FORMAT: Final = "shoal-tuning-1"
CHECKPOINT_BYTES_MAX: Final = 64 << 30
"""A LoRA of rank 1,024 on all layers of a 70B model, with AdamW's state, in float32."""

_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """One optimiser step."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the predictions that count."""
    rate: float
    """The learning rate."""
    gradient: float
    """The gradient's length before it was cut."""
    num_tokens: int
    """That went through the blocks, prompts included, padding not."""
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The examples that were kept back, after a step."""

    step: int
    loss: float
    accuracy: float | None
    """Share of classes told right; None for texts."""


@dataclass(slots=True, kw_only=True)
class History:
    """What has happened so far."""

    steps: list[StepDone]
    evaluations: list[Evaluated]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "steps": [asdict(one) for one in self.steps],
            "evaluations": [asdict(one) for one in self.evaluations],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> History:
        """The reverse; TypeError or KeyError for what is none."""
        return cls(
            steps=[StepDone(**one) for one in value["steps"]],
            evaluations=[Evaluated(**one) for one in value["evaluations"]],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A run between two steps."""

    run: Mapping[str, Any]
    """What was asked for, as JSON: checked by whoever goes on."""
    history: History
    tensors: Mapping[str, torch.Tensor]

    @property
    def num_steps(self) -> int:
        """Steps that are done."""
        return len(self.history.steps)


def write_checkpoint(
    path: Path,
    run: Mapping[str, Any],
    history: History,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Replace the file by the present state.

    Raises:
        ConfigError: it can't be written.
    """
    tensors = {}
    for name, value in model.named_parameters():
        tensors[name] = value.detach().cpu()
        for moment in _MOMENTS:
            if value in optimizer.state:
                tensors[f"{moment}/{name}"] = optimizer.state[value][moment].cpu()
    header = {"format": FORMAT, "run": json.dumps(run), "history": json.dumps(history.as_dict())}
    write_file(path, save({name: one.contiguous() for name, one in tensors.items()}, header))


def read_checkpoint(path: Path) -> Checkpoint:
    """The run in a file.

    Raises:
        ConfigError: there is none, or it is cut off, altered or of another kind.
    """
    data = read_whole(path, CHECKPOINT_BYTES_MAX)
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        if header["format"] != FORMAT:
            raise ValueError(f"it has the format {header['format']!r}, not {FORMAT!r}")
        run = json.loads(header["run"])
        history = History.from_dict(json.loads(header["history"]))
        return Checkpoint(run=run, history=history, tensors=load(data))
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"{path} is no checkpoint of ours: {error}") from error


def read_whole(path: Path, bytes_max: int) -> bytes:
    """A file that may be large.

    Raises:
        ConfigError: it can't be read, or is larger than `bytes_max`.
    """
    # Asked first: reading with a limit would take the limit's memory.
    if path.is_file() and path.stat().st_size > bytes_max:
        raise ConfigError(f"{path} has more than {bytes_max} bytes: it can't be a file of ours")
    return read_file(path)


def restore(
    checkpoint: Checkpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Give parameters and optimiser their state back.

    Raises:
        ConfigError: the checkpoint is of something else.
    """
    parameters = dict(model.named_parameters())
    found = {name: checkpoint.tensors.get(name) for name in parameters}
    for name, value in parameters.items():
        one = found[name]
        if one is None or one.shape != value.shape or not bool(torch.isfinite(one).all()):
            raise ConfigError(f"the checkpoint does not fit: {name} is missing, or of another kind")
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(checkpoint.tensors[name])
            moments = {kind: checkpoint.tensors.get(f"{kind}/{name}") for kind in _MOMENTS}
            if any(moment is None or moment.shape != value.shape for moment in moments.values()):
                if checkpoint.num_steps:
                    raise ConfigError(f"the checkpoint has no optimiser state of {name}")
                continue
            optimizer.state[value] = {
                "step": torch.tensor(float(checkpoint.num_steps)),
                **{
                    kind: moment.to(value) for kind, moment in moments.items() if moment is not None
                },
            }
