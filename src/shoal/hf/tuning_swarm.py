"""A swarm's model as a base for tuning: embedding, norm and head here, blocks at servers.

Shapes: B rows, S positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import cached_property

import torch

from shoal.base.errors import BadInput
from shoal.base.spans import Span, missing_blocks
from shoal.client.training_check import SpotChecks
from shoal.hf.model import DistributedModelForCausalLM
from shoal.hf.training import Tuning, run_blocks
from shoal.hf.training_loss import loss_behind
from shoal.hf.tuning_base import Pass, stacked_weights
from shoal.hf.tuning_examples import IGNORED
from shoal.hf.tuning_loss import next_token_loss
from shoal.model.lora import targets_of
from shoal.model.parts import Parts, meta_model


class SwarmBase:
    """A model whose blocks are at servers. It does not close the model."""

    def __init__(self, model: DistributedModelForCausalLM, *, is_rounded: bool = True) -> None:
        """`is_rounded`: what is learned in the blocks travels in bfloat16, half the bytes."""
        self.model = model
        self._is_rounded = is_rounded

    @property
    def num_blocks(self) -> int:
        """L."""
        return self.model.num_blocks

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.model.head.hidden_size

    @property
    def model_name(self) -> str:
        """The model's hash."""
        return self.model.model_name

    def missing(self) -> list[Span]:
        """Blocks that nobody has but servers that failed us or are full. From any thread.

        Raises:
            SessionClosed: the model was closed.
        """
        connection = self.model.connection
        connection.check_open()

        async def served() -> list[Span]:
            client = connection.visit.client
            avoided = client.experience.snapshot(asyncio.get_running_loop().time()).avoid
            return [one.span for one in client.view().servers if one.peer not in avoided]

        return missing_blocks(Span(0, self.num_blocks), connection.loop.run(served()))

    def checked(self) -> SpotChecks:
        """What spot checks found so far."""
        return self.model.training_client.checks

    def token_table(self) -> torch.Tensor:
        """(V, D) embeddings of all tokens."""
        table = self.model.get_input_embeddings().weight
        if not isinstance(table, torch.Tensor):
            raise BadInput("this model keeps no table of embeddings")
        return table

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, S, D) float32 token embeddings as they are looked up.

        Raises:
            BadInput: a token outside the vocabulary.
        """
        return self.model.head.look_up(ids).float()

    def states(self, embeddings: torch.Tensor, given: Pass) -> torch.Tensor:
        """(B, S, D) hidden states behind the final norm, 0 for padding.

        Raises:
            BadInput: shapes that don't fit.
            NoRouteError, PeerError: the swarm could not do it.
        """
        head = self.model.head
        entering = head.enter_blocks(embeddings)
        is_kept = _kept(given.lengths, int(embeddings.shape[1]))
        rows = run_blocks(
            self.model,
            entering[is_kept],
            given.lengths,
            Span(0, self.num_blocks),
            self._tuning(given),
        )
        states = head.leave_blocks(rows)
        batch = torch.zeros(*embeddings.shape, dtype=states.dtype)
        return batch.index_put((is_kept,), states)

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """(..., V) float32 scores of states behind the final norm."""
        return self.model.head.score_states(states)

    def loss(self, embeddings: torch.Tensor, given: Pass, wanted: torch.Tensor) -> torch.Tensor:
        """The sum of -log p(wanted) where a token is wanted, a scalar: the head computes while
        servers do.

        Raises:
            BadInput: shapes that don't fit.
            NoRouteError, PeerError: the swarm could not do it.
        """
        head = self.model.head
        is_kept = _kept(given.lengths, int(embeddings.shape[1]))
        tokens = wanted[is_kept]

        def behind(chosen: range, rows: torch.Tensor) -> torch.Tensor:
            labels = tokens[chosen.start : chosen.stop]
            counted = labels != IGNORED
            states = head.leave_blocks(rows[counted])
            return next_token_loss(states, labels[counted], head.score_states)

        return loss_behind(
            self.model,
            head.enter_blocks(embeddings)[is_kept],
            given.lengths,
            self._tuning(given),
            behind,
        )

    def linear_layers(self) -> Mapping[int, Mapping[str, tuple[int, int]]]:
        """(inputs, outputs) of each block's linear layers by their path in the block."""
        return self._layers

    def stacked_weights(self) -> tuple[str, ...]:
        """Paths in the blocks of weights that experts share in one tensor."""
        return stacked_weights(self._shapes)

    @cached_property
    def _shapes(self) -> Parts:
        """The model without weights."""
        return Parts(meta_model(self.model.config, torch.float32))

    @cached_property
    def _layers(self) -> dict[int, dict[str, tuple[int, int]]]:
        return {index: targets_of(block) for index, block in enumerate(self._shapes.blocks)}

    def _tuning(self, given: Pass) -> Tuning | None:
        lora = given.lora
        if lora is None and given.deep is None:
            return None
        key = None if lora is None else lora.dropout
        return Tuning(
            prompts=given.deep,
            lora={}
            if lora is None
            else {
                block: {target: (pair.a, pair.b) for target, pair in pairs.items()}
                for block, pairs in lora.pairs.items()
            },
            config=None if lora is None else lora.config,
            encoding="bfloat16" if self._is_rounded else "float32",
            seed=None if key is None else key.seed,
            step=0 if key is None else key.step,
        )


def _kept(lengths: tuple[int, ...], columns: int) -> torch.Tensor:
    """(B, S) bool: what is no padding."""
    return torch.arange(columns)[None] < torch.tensor(lengths)[:, None]
