"""A causal language model of transformers whose blocks are at servers.

`forward` is transformers' contract, so everything built on it works: `generate` in all its
modes, streamers, stopping criteria, logits processors. Embedding, final norm and head are
here, as torch modules; the KV cache is a batch of sessions (`chain_cache.py`).
Shapes: B rows, S new columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from shoal.base.errors import BadInput, ConfigError, ModelUnsupported
from shoal.base.spans import Span
from shoal.client.training import TrainConfig, TrainingClient
from shoal.hf.adapters import WithAdapters
from shoal.hf.blocks import RemoteBlocks
from shoal.hf.chain_cache import ChainCache
from shoal.hf.chain_row import Chains, open_row
from shoal.hf.connection import Connection
from shoal.hf.head import Head
from shoal.hf.model_inputs import (
    batch_of_scores,
    batch_of_states,
    check_has_news,
    the_input,
    wanted_columns,
)
from shoal.hf.padding import RowPart, check_positions, row_parts
from shoal.hf.sessions import Session
from shoal.hf.training import Tuning
from shoal.hf.training_forward import forward_whole

CONVERSATIONS_MAX: Final = 64
"""Calls of `generate_async` that run at the same time, each on a thread that mostly waits."""

_made_caches: ContextVar[weakref.WeakSet[ChainCache] | None] = ContextVar(
    "made_caches", default=None
)
"""Caches that the running `generate` made. Weak: tasks of the client live longer than the
context that they were started in, and would keep it."""


class DistributedModelForCausalLM(WithAdapters, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Made by `AutoDistributedModelForCausalLM.from_pretrained`. A context manager.

    Calls block; `generate_async` and sessions are for async code. Several threads may use
    one model, each with caches of its own.
    """

    main_input_name = "input_ids"

    def __init__(
        self,
        config: Any,
        *,
        head: Head,
        connection: Connection,
        chains: Chains,
        model_name: str,
        borders: tuple[int, ...] | None = None,
        load_tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(copy.deepcopy(config))
        self.head = head
        self.local_parts = torch.nn.ModuleDict(head.modules())
        self.connection = connection
        self.model_name = model_name
        """The model's hash: its name in the swarm."""
        self.num_blocks = int(config.num_hidden_layers)
        self.blocks = RemoteBlocks(self, Span(0, self.num_blocks))
        self._chains = chains
        self._borders = borders
        self._load_tokenizer = load_tokenizer
        self._threads: ThreadPoolExecutor | None = None
        self.tuning: Tuning | None = None
        """What is trained inside blocks, for calls without a cache that give none themselves."""
        self.training_steps = TrainConfig()
        """How batches are cut and spread; to be set before the first of them."""
        self._training: TrainingClient | None = None
        self._finalizer = weakref.finalize(self, connection.close)
        self.eval()

    # --- for transformers --------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where embedding and head are."""
        return self.head.device

    @property
    def vocab_size(self) -> int:
        """Tokens that the embedding knows."""
        return self.head.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """What embedding and head compute in."""
        return self.head.dtype

    def get_correct_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        """Of no effect: nothing here attends, whatever the config asks for."""
        return "eager"

    def get_correct_experts_implementation(self, *args: Any, **kwargs: Any) -> str:
        """Of no effect: experts are at the servers."""
        return "eager"

    def get_input_embeddings(self) -> torch.nn.Module:
        """The token embedding."""
        return self.head.modules()["embedding"]

    def get_output_embeddings(self) -> torch.nn.Module:
        """The language-model head."""
        return self.head.modules()["head"]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: ChainCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache_position: torch.Tensor | None = None,
        tuning: Tuning | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As transformers' models; what differs:

        Padding is not sent: where `attention_mask` is 0, logits and hidden states are 0 too.
        `output_hidden_states` gives the embedding, the states at the borders between spans
        and, last, those after the final norm; see `hidden_borders`.
        Gradients reach `inputs_embeds` and what is trained inside blocks (`tuning`, default:
        the model's); such calls run whole sequences and leave no cache. `cache_position` is
        not needed.

        Raises:
            BadInput: a mask with holes, positions or a cache that sessions can't have,
                gradients or attentions wanted.
            NoRouteError, PeerError, SessionError: the swarm could not do it.
        """
        if output_attentions:
            raise BadInput("attentions stay at the servers: leave output_attentions out")
        tuning = tuning if past_key_values is not None else tuning or self.tuning
        if tuning is not None or (torch.is_grad_enabled() and _wants(inputs_embeds)):
            if past_key_values is not None or output_hidden_states:
                raise BadInput("tuning runs whole sequences: no past_key_values, nor hidden states")
            output = forward_whole(
                self, input_ids, inputs_embeds, attention_mask, labels, logits_to_keep, tuning
            )
            return output.to_tuple() if return_dict is False else output
        kind, values = the_input(input_ids, inputs_embeds)
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        cache = self._cache_for(past_key_values, bool(output_hidden_states))
        is_kept = use_cache or past_key_values is not None
        try:
            parts = self._parts(values, attention_mask, position_ids, cache, is_kept=is_kept)
            columns = int(values.shape[1])
            wanted, first = wanted_columns(logits_to_keep, columns)
            keeps = [max(0, part.end - max(part.start, first)) for part in parts]
            found = cache.step(kind, values, parts, keeps)
        finally:
            if not is_kept:
                cache.close()
        last = [row[-1][len(row[-1]) - keep :] for row, keep in zip(found, keeps, strict=True)]
        scores = self.logits(torch.cat(last))  # the head runs once for the whole batch
        logits = batch_of_scores(scores, parts, keeps, first=first, columns=columns)
        if wanted is not None:
            logits = logits[:, wanted]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache if is_kept else None,
            hidden_states=self._states(found, parts, columns) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here."""
        raise ConfigError("call AutoDistributedModelForCausalLM.from_pretrained(MODEL, join=...)")

    def generate(self, *args: Any, adapter: str | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`; sessions that it opened and doesn't return are closed.

        `adapter` is one that was loaded, or "" for none (default: the active one).

        Raises:
            ConfigError: a cache implementation: the cache is at the servers; no such adapter.
            BadInput: `past_key_values` hold the whole input already.
        """
        if kwargs.get("cache_implementation") is not None:
            raise ConfigError("the KV cache is at the servers: leave cache_implementation out")
        check_has_news(*args, **kwargs)
        made: weakref.WeakSet[ChainCache] = weakref.WeakSet()
        token = _made_caches.set(made)
        result: Any = None
        try:
            with self._using(adapter):
                result = super().generate(*args, **kwargs)
        finally:
            _made_caches.reset(token)
            kept = getattr(result, "past_key_values", None)
            for cache in list(made):
                if cache is not kept:
                    cache.close()
        return result

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            cache = self._cache_for(None, bool(generation_config.output_hidden_states))
            made = _made_caches.get()
            if made is not None:
                made.add(cache)
            model_kwargs["past_key_values"] = cache

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: servers batch all sessions anyway."""
        raise ModelUnsupported("generate_batch: call generate, or generate_async many times")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: the weights are at the servers."""
        raise ModelUnsupported("the weights are at the servers: save sessions, not the model")

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here: the weights are at the servers."""
        raise ModelUnsupported("the weights are at the servers: there is nothing to upload")

    # --- for loops of one's own --------------------------------------------------------

    def new_cache(
        self,
        borders: Sequence[int] | None = None,
        *,
        with_states: bool = False,
        adapter: str | None = None,
    ) -> ChainCache:
        """An unused cache over the blocks between `borders` (default: all blocks).

        `with_states` it is for hidden states at all of them, see `hidden_borders`. `adapter` as
        in `generate`.

        Raises:
            ConfigError: borders that are none.
            SessionClosed: the model was closed.
        """
        self.connection.check_open()
        chosen = self._check_borders(borders or (0, self.num_blocks))
        chains = self._chains_with(adapter)
        return ChainCache(self.connection.loop, chains, chosen, with_states=with_states)

    def session(
        self,
        start: int = 0,
        end: int | None = None,
        *,
        cache: ChainCache | None = None,
        adapter: str | None = None,
    ) -> Session:
        """A session over blocks [start, end) (default: all), or the one that `cache` holds.

        `adapter` as in `generate`.

        Raises:
            ConfigError: no such blocks.
            NoRouteError, PeerError: no chain within the patience.
        """
        if cache is None:
            borders = (start, self.num_blocks if end is None else end)
            cache = self.new_cache(borders, adapter=adapter)
            self.connection.loop.run(cache.open())
        return Session(self, cache)

    async def session_async(self, start: int = 0, end: int | None = None) -> Session:
        """`session` for async code."""
        cache = self.new_cache((start, self.num_blocks if end is None else end))
        await self.connection.loop.run_from(cache.open())
        return Session(self, cache)

    def load_session(self, path: str | Path, *, restore_rng: bool = True) -> Session:
        """A saved session; see `Session.load`."""
        return Session.load(self, path, restore_rng=restore_rng)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., V) float32 scores for (..., D) hidden states that left the last block."""
        return self.head.scores(hidden_states).to(self.device)

    @property
    def training_client(self) -> TrainingClient:
        """Runs training steps; see `shoal.hf.training.run_blocks`."""
        if self._training is None:
            self._training = TrainingClient(self.connection.visit.client, self.training_steps)
        return self._training

    @property
    def training_encoding(self) -> str:
        """How rows and their gradients travel: as the servers compute."""
        return self._chains.encoding

    def hidden_borders(self) -> tuple[int, ...]:
        """Where `output_hidden_states` looks: the borders given to `from_pretrained`, or
        those between the servers of the chain that a session would take now."""
        self.connection.check_open()
        if self._borders is None:
            return self.connection.loop.run(_chain_borders(self._chains, self.num_blocks))
        return self._borders

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the model's files hold.

        Raises:
            ModelUnsupported: they hold none.
        """
        if self._load_tokenizer is None:
            raise ModelUnsupported("this model was opened without its files")
        return self._load_tokenizer()

    # --- async, and the end ------------------------------------------------------------

    async def generate_async(
        self,
        *args: Any,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` for async code: it runs on a thread, which cancelling stops at the next
        token. torch's random state is shared by all threads: seed single conversations with
        a sampler of your own instead."""
        is_cancelled = threading.Event()
        criteria = StoppingCriteriaList([*(stopping_criteria or ()), _StopWhen(is_cancelled)])
        if self._threads is None:
            self._threads = ThreadPoolExecutor(CONVERSATIONS_MAX, "shoal generate")
        call = partial(self.generate, *args, stopping_criteria=criteria, **kwargs)
        work = asyncio.get_running_loop().run_in_executor(self._threads, call)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            is_cancelled.set()
            await asyncio.gather(work, return_exceptions=True)
            raise

    def close(self) -> None:
        """Close all sessions and leave the swarm. Idempotent; also done at exit."""
        self._finalizer()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> DistributedModelForCausalLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> DistributedModelForCausalLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    # --- inside ------------------------------------------------------------------------

    def _cache_for(self, given: Any, with_states: bool) -> ChainCache:
        if given is None:
            borders = self.hidden_borders() if with_states else None
            return self.new_cache(borders, with_states=with_states)
        if not isinstance(given, ChainCache):
            raise BadInput(
                f"past_key_values is a {type(given).__name__}: pass on what this model returned, "
                "or leave it out"
            )
        if (given.borders[0], given.borders[-1]) != (0, self.num_blocks):
            raise BadInput("this cache runs over some blocks only: use its session's step")
        if with_states and not given.with_states:
            raise BadInput(
                "this cache was begun without output_hidden_states: begin with it, or leave it out"
            )
        return given

    def _check_borders(self, borders: Sequence[int]) -> tuple[int, ...]:
        chosen = tuple(borders)
        is_rising = all(a < b for a, b in pairwise(chosen))
        if len(chosen) < 2 or not is_rising or chosen[0] < 0 or chosen[-1] > self.num_blocks:
            raise ConfigError(
                f"borders {chosen}: give at least two numbers from 0 to {self.num_blocks}, rising"
            )
        return chosen

    def _states(
        self, found: list[list[torch.Tensor]], parts: list[RowPart], columns: int
    ) -> tuple[torch.Tensor, ...]:
        """(B, S, D) at each border, zeros for padding; the last one after the final norm."""
        for row in found:
            row[-1] = self.head.normalized(row[-1])
        states = (batch_of_states(rows, parts, columns) for rows in zip(*found, strict=True))
        return tuple(state.to(device=self.device, dtype=self.dtype) for state in states)

    def _parts(
        self,
        values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: ChainCache,
        *,
        is_kept: bool,
    ) -> list[RowPart]:
        batch, columns = int(values.shape[0]), int(values.shape[1])
        past = cache.get_seq_length()
        pads = cache.pads if past else [0] * batch
        if len(pads) != batch:
            raise BadInput(f"a batch of {batch} for a cache of {len(pads)} rows")
        parts = row_parts(attention_mask, pads=pads, past=past, new=columns, is_kept=is_kept)
        if position_ids is not None:
            check_positions(position_ids, parts, cache.lengths(batch))
        return parts


def _wants(values: torch.Tensor | None) -> bool:
    return values is not None and values.requires_grad


class _StopWhen(StoppingCriteria):  # type: ignore[misc]
    """Ends all rows when the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


async def _chain_borders(chains: Chains, num_blocks: int) -> tuple[int, ...]:
    row = await open_row(chains, (0, num_blocks))
    try:
        return (0, *(stage.span.end for stage in row.chain))
    finally:
        row.close()
