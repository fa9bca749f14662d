"""A whole model in this process as a base for tuning: transformers' own, frozen.

What `shoal finetune --local` trains, for models that fit into one machine, and what training
through a swarm is compared with.
Shapes: B rows, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from shoal.base.adapters import RowRun
from shoal.hf.head import Head
from shoal.hf.tuning_base import Pass, stacked_weights
from shoal.hf.tuning_examples import IGNORED
from shoal.hf.tuning_loss import next_token_loss
from shoal.model.lora import LoraDropout, lora_in, targets_of
from shoal.model.parts import Parts
from shoal.model.rows import torch_dtype
from shoal.model.source import ModelSource


class WholeBase:
    """transformers' model; made by `load_whole`."""

    def __init__(self, whole: Any, model_name: str) -> None:
        self.whole = whole
        self.model_name = model_name
        """The model's hash."""
        self._parts = Parts(whole)
        self._head = Head(self._parts)
        whole.requires_grad_(False)
        whole.eval()

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self._parts.blocks)

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self._parts.embedding.weight.shape[1])

    def token_table(self) -> torch.Tensor:
        """(V, D) embeddings of all tokens."""
        table: torch.Tensor = self._parts.embedding.weight
        return table

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, S, D) float32 token embeddings as they are looked up.

        Raises:
            BadInput: a token outside the vocabulary.
        """
        return self._head.look_up(ids).float()

    def states(self, embeddings: torch.Tensor, given: Pass) -> torch.Tensor:
        """(B, S, D) hidden states behind the final norm.

        Raises:
            BadInput: the texts don't fit into the model.
        """
        with ExitStack() as stack:
            for index, block in enumerate(self._parts.blocks):
                if given.deep is not None:
                    hook = _Additions(given.deep[index])
                    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
                if given.lora is not None and index in given.lora.pairs:
                    lora = given.lora
                    dropout = _dropout(given, index, int(embeddings.shape[1]))
                    stack.enter_context(
                        lora_in(block, lora.pairs[index], lora.config.scale, dropout)
                    )
            rows = embeddings.to(self.token_table().dtype)
            states: torch.Tensor = self._parts.core(
                inputs_embeds=rows, use_cache=False
            ).last_hidden_state
        return states

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """(..., V) float32 scores of states behind the final norm."""
        return self._head.score_states(states)

    def loss(self, embeddings: torch.Tensor, given: Pass, wanted: torch.Tensor) -> torch.Tensor:
        """The sum of -log p(wanted) where a token is wanted, a scalar."""
        counted = wanted != IGNORED
        states = self.states(embeddings, given)
        return next_token_loss(states[counted], wanted[counted], self.scores)

    def linear_layers(self) -> Mapping[int, Mapping[str, tuple[int, int]]]:
        """(inputs, outputs) of each block's linear layers by their path in the block."""
        return {index: targets_of(block) for index, block in enumerate(self._parts.blocks)}

    def stacked_weights(self) -> tuple[str, ...]:
        """Paths in the blocks of weights that experts share in one tensor."""
        return stacked_weights(self._parts)


def load_whole(source: ModelSource, model_name: str, *, dtype: str = "float32") -> WholeBase:
    """Read all of a model.

    Raises:
        ConfigError: unknown dtype.
        ModelError: broken or unsupported.
    """
    kind = torch_dtype(dtype)
    whole = AutoModelForCausalLM.from_config(source.config, dtype=kind)
    state = {name: source.read(name).to(kind) for name in source.tensor_names()}
    whole.load_state_dict(state, strict=False)
    whole.tie_weights()
    return WholeBase(whole, model_name)


class _Additions:
    """Adds a deep prompt where it enters a block."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def __call__(
        self, _block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._added(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._added(kwargs["hidden_states"])}

    def _added(self, hidden: torch.Tensor) -> torch.Tensor:
        count = len(self._values)
        padding = (0, 0, 0, hidden.shape[1] - count)
        return hidden + torch.nn.functional.pad(self._values.to(hidden.dtype), padding)


def _dropout(given: Pass, block: int, columns: int) -> LoraDropout | None:
    lora = given.lora
    if lora is None or lora.dropout is None or not lora.config.dropout:
        return None
    # Padding has rows here that servers never see; what it draws changes nothing.
    runs = tuple(RowRun(number, 0, columns) for number in range(len(given.lengths)))
    return LoraDropout(probability=lora.config.dropout, key=lora.dropout, block=block, runs=runs)
