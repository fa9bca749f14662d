"""The model as transformers has it, with its blocks at servers.

`AutoDistributedModelForCausalLM.from_pretrained` is the way in and `LocalSwarm` a swarm to
try it on. Below are the client's torch side (`head.py`: embedding, norm, head), sequences
(`chain_row.py`), caches for `generate` (`chain_cache.py`) and the model class (`model.py`).
Fine-tuning is `tuning.py`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.hf.auto import AutoDistributedModelForCausalLM
    from shoal.hf.chain_cache import ChainCache
    from shoal.hf.local_swarm import LocalSwarm
    from shoal.hf.model import DistributedModelForCausalLM
    from shoal.hf.sessions import Session
    from shoal.hf.tuning_classes import (
        AutoDistributedModelForSequenceClassification,
        DistributedModelForSequenceClassification,
    )

__all__ = [
    "AutoDistributedModelForCausalLM",
    "AutoDistributedModelForSequenceClassification",
    "ChainCache",
    "DistributedModelForCausalLM",
    "DistributedModelForSequenceClassification",
    "LocalSwarm",
    "Session",
]

_HOMES = {
    "AutoDistributedModelForCausalLM": "shoal.hf.auto",
    "AutoDistributedModelForSequenceClassification": "shoal.hf.tuning_classes",
    "ChainCache": "shoal.hf.chain_cache",
    "DistributedModelForCausalLM": "shoal.hf.model",
    "DistributedModelForSequenceClassification": "shoal.hf.tuning_classes",
    "LocalSwarm": "shoal.hf.local_swarm",
    "Session": "shoal.hf.sessions",
}


def __getattr__(name: str) -> object:
    # On first use: commands import single modules of this package and must stay quick.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shoal.hf' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
