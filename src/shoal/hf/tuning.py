"""Fine-tuning for loops of one's own: what to learn, where the frozen model is, how to train.

    base = SwarmBase(model)                        # of AutoDistributedModelForCausalLM
    tuned = TunedModel(base, prompt=PromptTuning(prompt_from_tokens(base.token_table(), 16, rng)))
    optimizer = torch.optim.AdamW(tuned.parameters())

`TunedModel` takes batches and gives losses, `TunedForward` has the calls of transformers'
models (for `Trainer`), `TuningRun` is the loop of `shoal finetune`. See docs/finetuning.md.
"""

from __future__ import annotations

from shoal.base.adapters import AdapterConfig
from shoal.hf.tuning_base import Pass, TuningBase
from shoal.hf.tuning_build import Method, build
from shoal.hf.tuning_examples import Batch, Example, Prepared, make_batch, prepare
from shoal.hf.tuning_files import read_learned, write_result
from shoal.hf.tuning_forward import TunedForward
from shoal.hf.tuning_lines import read_lines
from shoal.hf.tuning_loop import TuningRun
from shoal.hf.tuning_methods import (
    ClassHead,
    DeepPromptTuning,
    Lora,
    PromptTuning,
    prompt_from_tokens,
)
from shoal.hf.tuning_model import Loss, TunedModel
from shoal.hf.tuning_settings import TuningSettings
from shoal.hf.tuning_start import Start, read_start
from shoal.hf.tuning_swarm import SwarmBase
from shoal.hf.tuning_whole import WholeBase, load_whole

__all__ = [
    "AdapterConfig",
    "Batch",
    "ClassHead",
    "DeepPromptTuning",
    "Example",
    "Lora",
    "Loss",
    "Method",
    "Pass",
    "Prepared",
    "PromptTuning",
    "Start",
    "SwarmBase",
    "TunedForward",
    "TunedModel",
    "TuningBase",
    "TuningRun",
    "TuningSettings",
    "WholeBase",
    "build",
    "load_whole",
    "make_batch",
    "prepare",
    "prompt_from_tokens",
    "read_learned",
    "read_lines",
    "read_start",
    "write_result",
]
