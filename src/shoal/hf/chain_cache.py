"""What transformers takes for a KV cache: sessions, one for each row of a batch.

The keys and values are at the servers. Reordering rows (beam search) forks sessions,
cropping truncates them, dropping the cache closes them.
Shapes: B rows, S new columns, D hidden size.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from shoal.base.errors import BadInput, SessionClosed, ShoalError
from shoal.hf.chain_row import ChainRow, Chains, Chunk, ChunkKind, open_row, together
from shoal.hf.loop import BackgroundLoop
from shoal.hf.padding import RowPart


class ChainCache(Cache):  # type: ignore[misc]
    """Sessions of the rows of one batch. Pass it as `past_key_values`.

    It opens its sessions at the first call. Not for two threads at once.
    """

    def __init__(
        self,
        loop: BackgroundLoop,
        chains: Chains,
        borders: tuple[int, ...],
        *,
        with_states: bool = False,
    ) -> None:
        super().__init__(layers=[])
        self.borders = borders
        self.with_states = with_states
        """Whether its steps give the hidden states at all borders."""
        self.pads: list[int] = []
        """Columns of padding before each row's first token."""
        self._loop = loop
        self._chains = chains
        self._columns = 0
        self._is_closed = False
        self._rows: list[ChainRow] = []
        # The servers must get their memory back when nobody holds the cache any more.
        self._finalizer = weakref.finalize(self, _close_soon, loop, self._rows)

    @property
    def rows(self) -> tuple[ChainRow, ...]:
        """The sessions, one a row."""
        return tuple(self._rows)

    @property
    def adapter(self) -> bytes:
        """Name of the LoRA adapter that its rows go through; empty: none."""
        return self._chains.adapter

    @property
    def is_closed(self) -> bool:
        """Whether its sessions were closed."""
        return self._is_closed

    def close(self) -> None:
        """Free the sessions here and at the servers. Idempotent."""
        self._is_closed = True
        self._finalizer()

    # --- what the model does -----------------------------------------------------------

    def lengths(self, batch: int) -> list[int]:
        """Tokens in each row so far; `batch` is what an unused cache will hold."""
        return [row.length for row in self._rows] or [0] * batch

    def step(
        self, kind: ChunkKind, values: torch.Tensor, parts: Sequence[RowPart], keeps: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        """`advance` for code that is not async."""
        return self._loop.run(self.advance(kind, values, parts, keeps))

    async def open(self) -> None:
        """Open one row now, on the client's loop, rather than at the first call."""
        self._rows[:] = await self._opened(1)
        self.pads = [0]

    async def replay(self, chunks: Sequence[Chunk]) -> None:
        """Run a saved row's chunks again, on the client's loop; the cache has one new row."""
        (row,) = self._rows
        await row.replay(chunks)
        self._columns = row.length

    async def advance(
        self, kind: ChunkKind, values: torch.Tensor, parts: Sequence[RowPart], keeps: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        """Run the new columns of all rows at once, on the client's loop.

        `values` is (B, S) or (B, S, D); `keeps` says how many of its last hidden states each
        row wants, see `ChainRow.step`. Equal rows of an unused cache are computed once.
        If it fails, all rows are as long as before.

        Raises:
            BadInput: another number of rows than before.
            SessionClosed: the cache was closed.
        """
        self._check_open()
        if self._rows and len(self._rows) != len(parts):
            raise BadInput(f"a batch of {len(parts)} for a cache of {len(self._rows)} rows")
        inputs = [
            values[index, part.start : part.end].detach().to("cpu").clone()
            for index, part in enumerate(parts)
        ]
        if self._rows:
            found = await self._step_rows(kind, inputs, keeps)
        else:
            found = await self._first_step(kind, inputs, keeps)
        if not self._columns:
            self.pads = [part.start for part in parts]
        self._columns += int(values.shape[1])
        return found

    async def _step_rows(
        self, kind: ChunkKind, inputs: Sequence[torch.Tensor], keeps: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        before = [row.length for row in self._rows]
        works = [
            asyncio.ensure_future(row.step(kind, values, keep))
            for row, values, keep in zip(self._rows, inputs, keeps, strict=True)
        ]
        try:
            return await asyncio.gather(*works)
        except BaseException:
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            _cut_back(self._rows, before)
            raise

    async def _first_step(
        self, kind: ChunkKind, inputs: Sequence[torch.Tensor], keeps: Sequence[int]
    ) -> list[list[torch.Tensor]]:
        firsts = [
            next(at for at, other in enumerate(inputs) if torch.equal(other, mine))
            for mine in inputs
        ]
        distinct = sorted(set(firsts))
        opened = await self._opened(len(distinct))
        self._rows[:] = opened
        try:
            found = await self._step_rows(
                kind, [inputs[at] for at in distinct], [keeps[at] for at in distinct]
            )
            order = [distinct.index(at) for at in firsts]
            self._rows[:] = await _selected(opened, order)
        except BaseException:
            self._rows.clear()
            for row in opened:
                row.close()
            raise
        return [found[at] for at in order]

    async def _opened(self, count: int) -> list[ChainRow]:
        works = (
            open_row(self._chains, self.borders, with_states=self.with_states) for _ in range(count)
        )
        return await together(list(works))

    # --- what transformers asks --------------------------------------------------------

    def __len__(self) -> int:
        return self.borders[-1] - self.borders[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rows={len(self._rows)}, columns={self._columns})"

    def __deepcopy__(self, memo: dict[int, Any]) -> ChainCache:
        """A cache with the same past in sessions of its own, for prompts used many times."""
        return self._loop.run(self.forked())

    async def forked(self) -> ChainCache:
        """The same on the client's loop."""
        self._check_open()
        copied = ChainCache(self._loop, self._chains, self.borders, with_states=self.with_states)
        copied._rows[:] = await together([row.fork() for row in self._rows])
        copied.pads, copied._columns = list(self.pads), self._columns
        return copied

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self._columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first call."""
        return len(self._rows) or -1

    @property
    def max_batch_size(self) -> int:
        """As `batch_size`."""
        return self.batch_size

    @property
    def is_compileable(self) -> bool:
        """Nothing here can be traced."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether sessions are open."""
        return bool(self._rows)

    @property
    def is_croppable(self) -> bool:
        """Sessions can be truncated."""
        return True

    def activate_past_recording(self) -> None:
        """Nothing to do: servers compute again what they can't cut."""

    def crop(self, max_length: int) -> None:
        """Forget columns at the end.

        transformers called this with the columns to keep (5.0), then with minus the columns
        to drop: above 0 is the former, 0 drops nothing.

        Raises:
            BadInput: a row would lose its padding.
        """
        columns = max_length if max_length > 0 else self._columns + max_length
        if columns < self._columns:
            self._loop.run(self.truncate(columns))

    async def truncate(self, columns: int) -> None:
        """Keep the first `columns`, on the client's loop.

        Raises:
            BadInput: not so many columns, or a row would lose its padding.
        """
        self._check_open()
        lengths = [columns - pad for pad in self.pads]
        if not 0 <= columns <= self._columns or min(lengths, default=0) < 0:
            raise BadInput(
                f"can't cut {self._columns} columns to {columns}, padding is {self.pads}"
            )
        for row, length in zip(self._rows, lengths, strict=True):
            row.truncate(length)
        self._columns = columns

    def reset(self) -> None:
        """Close the sessions; the next call opens new ones."""
        self._loop.run(_close_all(self._rows))
        self._columns, self.pads = 0, []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._select([int(index) for index in beam_idx])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order."""
        self._select([int(index) for index in torch.arange(len(self._rows))[indices.cpu()]])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self._select([index for index in range(len(self._rows)) for _ in range(repeats)])

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Keys and values are at the servers."""
        raise BadInput("this cache holds sessions at servers: another model can't write into it")

    def _select(self, order: list[int]) -> None:
        self._check_open()
        if order == list(range(len(self._rows))):
            return
        self._rows[:] = self._loop.run(_selected(list(self._rows), order))
        self.pads = [self.pads[index] for index in order]

    def _check_open(self) -> None:
        if self._is_closed:
            raise SessionClosed("this cache was closed: start without past_key_values")


async def _selected(rows: Sequence[ChainRow], order: Sequence[int]) -> list[ChainRow]:
    """Rows in a new order: a row's first use keeps it, each further one forks it, rows that
    aren't used are closed."""
    first_uses = {index: at for at, index in reversed(list(enumerate(order)))}
    again = [at for at, index in enumerate(order) if first_uses[index] != at]
    forks = await together([rows[order[at]].fork() for at in again])
    selected = [rows[index] for index in order]
    for at, fork in zip(again, forks, strict=True):
        selected[at] = fork
    for index, row in enumerate(rows):
        if index not in first_uses:
            row.close()
    return selected


def _cut_back(rows: Sequence[ChainRow], lengths: Sequence[int]) -> None:
    for row, length in zip(rows, lengths, strict=True):
        try:
            row.truncate(min(length, row.length))
        except ShoalError:
            continue  # this one failed for good, and says why when it is used next


async def _close_all(rows: list[ChainRow]) -> None:
    while rows:
        rows.pop().close()


def _close_soon(loop: BackgroundLoop, rows: list[ChainRow]) -> None:
    """Close rows from any thread; they are taken out of the list at once."""
    taken = list(rows)
    rows.clear()

    def close() -> None:
        for row in taken:
            row.close()

    loop.call_soon(close)
