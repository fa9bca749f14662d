"""A session for loops of one's own: any span, any hidden states, token by token.

Every call that waits has a twin for async code (`step` and `step_async`); both may be used
on the same session, from one task or thread at a time.
Shapes: S new positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from shoal.base.errors import BadInput, ConfigError
from shoal.base.spans import Span
from shoal.client.session import Move, Recovery
from shoal.hf.chain_cache import ChainCache
from shoal.hf.chain_row import ChainRow, ChunkKind
from shoal.hf.padding import RowPart
from shoal.hf.saved_session import SavedSession, pack, read_file, unpack, write_file
from shoal.plan.view import Stage

if TYPE_CHECKING:
    from shoal.hf.model import DistributedModelForCausalLM


class Session:
    """One sequence at the servers. Made by `model.session()`; a context manager."""

    def __init__(self, model: DistributedModelForCausalLM, cache: ChainCache) -> None:
        if len(cache.rows) != 1:
            raise BadInput(f"a session is one sequence, but this cache has {len(cache.rows)} rows")
        self.generation_config: GenerationConfig | None = None
        """Saved with the session, and what a loaded session was saved with."""
        self._model = model
        self._cache = cache
        self._loop = model.connection.loop

    # --- what it is --------------------------------------------------------------------

    @property
    def past_key_values(self) -> ChainCache:
        """The session as `generate` and `forward` take it."""
        return self._cache

    @property
    def span(self) -> Span:
        """The blocks that it runs over."""
        return Span(self._cache.borders[0], self._cache.borders[-1])

    @property
    def length(self) -> int:
        """Positions so far."""
        return self._row.length

    @property
    def token_ids(self) -> list[int]:
        """All tokens that came as ids, in order; without those that came as tensors."""
        chunks = [chunk for chunk in self._row.chunks if chunk.kind == "ids"]
        return [int(token) for chunk in chunks for token in chunk.values]

    @property
    def chain(self) -> tuple[Stage, ...]:
        """Which server runs which blocks now."""
        return self._row.chain

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """The repairs so far."""
        return self._row.recoveries

    @property
    def moves(self) -> tuple[Move, ...]:
        """The planned changes of the chain so far."""
        return self._row.moves

    @property
    def numerics(self) -> str:
        """`exact`, `same-class` or `crossed`: what repairs did to the numbers."""
        return self._row.numerics

    # --- steps -------------------------------------------------------------------------

    def step(self, hidden_states: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """Run hidden states through the span's blocks, as they are.

        Args:
            hidden_states: (S, D) or (1, S, D).
            last: whether only the last position's output is wanted, which saves traffic.

        Returns:
            Outputs in the same shape (S is 1 with `last`), dtype and place.

        Raises:
            BadInput: a wrong shape, values that are not finite, or gradients wanted.
            NoRouteError, PeerError, SessionError: the swarm could not do it.
        """
        found = self._loop.run(self._advance("hidden", *self._states(hidden_states), last))
        return _like(found, hidden_states)

    async def step_async(self, hidden_states: torch.Tensor, *, last: bool = False) -> torch.Tensor:
        """`step` for async code."""
        work = self._advance("hidden", *self._states(hidden_states), last)
        return _like(await self._loop.run_from(work), hidden_states)

    def step_ids(
        self, token_ids: torch.Tensor | Sequence[int], *, last: bool = False
    ) -> torch.Tensor:
        """Embed tokens and run them; the span must begin at block 0.

        Args:
            token_ids: S ids, also as (1, S).
            last: whether only the last position's output is wanted.

        Returns:
            (S, D) hidden states behind the span, for `model.logits`; (1, D) with `last`.

        Raises:
            BadInput: no tokens, tokens outside the vocabulary, or the span begins elsewhere.
            NoRouteError, PeerError, SessionError: the swarm could not do it.
        """
        return self._loop.run(self._advance("ids", *self._ids(token_ids), last))

    async def step_ids_async(
        self, token_ids: torch.Tensor | Sequence[int], *, last: bool = False
    ) -> torch.Tensor:
        """`step_ids` for async code."""
        return await self._loop.run_from(self._advance("ids", *self._ids(token_ids), last))

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`; the next step goes on from there.

        Raises:
            BadInput: longer than the session.
        """
        self._loop.run(self._cache.truncate(length))

    def fork(self) -> Session:
        """A second session with the same past; nothing is computed again."""
        return Session(self._model, self._loop.run(self._cache.forked()))

    async def fork_async(self) -> Session:
        """`fork` for async code."""
        return Session(self._model, await self._loop.run_from(self._cache.forked()))

    def close(self) -> None:
        """Free it here and at the servers. Idempotent."""
        self._cache.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    # --- files -------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the inputs, `generation_config` and torch's random state to a file.

        Only the owner can read the file: it holds the conversation.

        Raises:
            ConfigError: the file can't be written.
        """
        config = self.generation_config or self._model.generation_config
        saved = SavedSession(
            model=self._model.model_name,
            borders=self._cache.borders,
            chunks=self._row.chunks,
            generation_config=config.to_diff_dict(),
            rng_state=torch.get_rng_state(),
            adapter=self._cache.adapter.hex(),
        )
        write_file(Path(path), pack(saved))

    @classmethod
    def load(
        cls, model: DistributedModelForCausalLM, path: str | Path, *, restore_rng: bool = True
    ) -> Session:
        """The session in a file, computed again by the servers that are there now.

        `restore_rng` sets torch's random state to what it was, so that sampling goes on as
        it would have.

        Raises:
            ConfigError: no such file, or it was saved with another model.
            NoRouteError: it has an adapter that is neither loaded here nor at servers.
            NoRouteError, PeerError, SessionError: the swarm could not do it.
        """
        saved = unpack(read_file(Path(path)), model.head.hidden_size)
        if saved.model != model.model_name:
            raise ConfigError(
                f"{path} was saved with model {saved.model}, this is {model.model_name}: load it "
                "with the model it belongs to"
            )
        cache = model.new_cache(
            saved.borders, with_states=len(saved.borders) > 2, adapter=saved.adapter
        )
        model.connection.loop.run(_replayed(cache, saved))
        session = cls(model, cache)
        if saved.generation_config is not None:
            session.generation_config = GenerationConfig.from_dict(saved.generation_config)
        if restore_rng and saved.rng_state is not None:
            torch.set_rng_state(saved.rng_state)
        return session

    # --- inside ------------------------------------------------------------------------

    @property
    def _row(self) -> ChainRow:
        if not self._cache.rows:
            raise BadInput("this session was closed")
        return self._cache.rows[0]

    async def _advance(self, kind: ChunkKind, values: torch.Tensor, last: bool) -> torch.Tensor:
        count = int(values.shape[1])
        keep = 1 if last else count
        found = await self._cache.advance(kind, values, [RowPart(start=0, end=count)], [keep])
        return found[0][-1][-keep:]

    def _states(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor]:
        check_inference(hidden_states)
        size = self._model.head.hidden_size
        batch = hidden_states[None] if hidden_states.dim() == 2 else hidden_states
        if batch.dim() != 3 or batch.shape[0] != 1 or batch.shape[2] != size or not batch.shape[1]:
            raise BadInput(
                f"hidden states of shape {tuple(hidden_states.shape)}: give (positions, {size})"
            )
        return (batch,)

    def _ids(self, token_ids: torch.Tensor | Sequence[int]) -> tuple[torch.Tensor]:
        if self.span.start:
            raise BadInput(f"tokens enter at block 0, this session begins at {self.span.start}")
        ids = torch.as_tensor(token_ids).reshape(1, -1)
        if not ids.numel() or ids.dtype.is_floating_point:
            raise BadInput("give at least one token id, and only whole numbers")
        return (ids.long(),)


async def _replayed(cache: ChainCache, saved: SavedSession) -> None:
    await cache.open()
    try:
        await cache.replay(saved.chunks)
    except BaseException:
        cache.close()
        raise


def check_inference(values: torch.Tensor) -> None:
    """Refuse values whose gradients are wanted: blocks at servers only infer.

    Raises:
        BadInput: autograd follows them.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        raise BadInput(
            "gradients don't flow through blocks at servers: use torch.no_grad() or detach()"
        )


def _like(found: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    rows = found.to(device=given.device, dtype=given.dtype)
    return rows[None] if given.dim() == 3 else rows
