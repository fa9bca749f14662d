"""What a user of a session holds: steps in, rows out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from shoal.base.errors import BadInput, SessionClosed
from shoal.base.ids import PeerId, SessionId
from shoal.client.session import Move, Payload, Recovery, SessionState, split_chunks
from shoal.plan.view import Stage
from shoal.wire.frames import Buffer
from shoal.wire.messages import WANT_LAST, Fork, Want

if TYPE_CHECKING:
    from shoal.client.client import Client

CHUNK_TOKENS_MAX: Final = 256
"""Rows per prefill chunk of a long prompt: while one server runs a chunk, the one before runs
the next. Also the longest that a prompt delays other sessions' tokens."""

CHUNK_TOKENS_MIN: Final = 96
"""Rows per chunk of a short one. Measured (1.1B shape, bfloat16, 512 rows through two servers,
over transformers in one process): chunks of 64 and 96 rows 1.77 and 1.76, of 128 rows 1.68."""

CHUNKS_MIN: Final = 8
"""Chunks of a prompt, where its length allows: k chunks keep two servers busy for k of k + 1
turns."""


def choose_chunk(count: int) -> int:
    """Rows per chunk for a prompt of `count` rows.

    Only the length counts, not the chain: another chain gives the same chunks, so that
    the same prompt gives the same bits there.
    """
    size = count // CHUNKS_MIN // 32 * 32  # whole tiles of the matrix units
    return min(CHUNK_TOKENS_MAX, max(CHUNK_TOKENS_MIN, size))


class ChainSession:
    """A sequence on a chain of servers. Not for two tasks at once.

    A failure of servers is repaired below `step`; the step just takes longer.
    """

    def __init__(self, client: Client, state: SessionState) -> None:
        self._client = client
        self._state = state

    @property
    def id(self) -> SessionId:
        """The session's id."""
        return self._state.id

    @property
    def encoding(self) -> str:
        """How its rows look as bytes."""
        return self._state.encoding

    @property
    def adapter(self) -> bytes:
        """Name of the adapter that its rows go through; empty: none."""
        return self._state.adapter

    @property
    def length(self) -> int:
        """Positions appended so far."""
        return self._state.length

    @property
    def epoch(self) -> int:
        """How often the chain was made or changed."""
        return self._state.epoch

    @property
    def rev(self) -> int:
        """How often the session was truncated."""
        return self._state.log.rev

    @property
    def chain(self) -> tuple[Stage, ...]:
        """Who runs which blocks now."""
        return tuple(stage for stage in self._state.chain if len(stage.span))

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """The repairs so far."""
        return tuple(self._state.recoveries)

    @property
    def moves(self) -> tuple[Move, ...]:
        """The planned changes of the chain so far."""
        return tuple(self._state.moves)

    @property
    def standbys(self) -> tuple[Stage, ...]:
        """Who stands by for which blocks now."""
        return tuple(standby.stage for standby in self._state.standbys)

    @property
    def numerics(self) -> str:
        """`exact`, `same-class` or `crossed`: what repairs did to the numbers."""
        return self._state.numerics

    @property
    def owner(self) -> PeerId:
        """Our own id."""
        return self._client.me

    async def step(
        self, payload: Payload, count: int, *, want: Want = WANT_LAST,
        chunk_tokens: int | None = None,
    ) -> bytes:  # fmt: skip
        """Run `count` more rows through the chain; returns the rows that `want` names.

        Long inputs travel as chunks of `chunk_tokens` (default: by the length), in a
        pipeline over the servers.

        Raises:
            BadInput: rows of a wrong size, or values that a server refuses.
            SessionTooLong: a server's cache or the model's context ends here.
            NoRouteError, PeerError: no chain could be repaired within the patience.
            SessionClosed: the session was closed.
        """
        start = self.length
        self.append(payload, count, want=want, chunk_tokens=chunk_tokens)
        return await self.rows(start, start + count)

    def append(
        self, payload: Payload, count: int, *, want: Want = WANT_LAST,
        chunk_tokens: int | None = None,
    ) -> None:  # fmt: skip
        """Send `count` more rows without waiting for the answer.

        A callable makes all rows once here: what it raises is the caller's, and must not break
        the stream that other sessions share when it is called again to send them.

        Raises:
            BadInput: rows of a wrong size.
        """
        state = self._state
        state.check_open()
        offset = 0
        chunks = split_chunks(state.length, count, chunk_tokens or choose_chunk(count), want)
        if callable(payload):
            _check_makes(payload, state.length, [size for size, _ in chunks], state.row_bytes)
        for size, chunk_want in chunks:
            if callable(payload):
                part: Payload = payload
            else:
                view = memoryview(payload)
                part = view[offset * state.row_bytes : (offset + size) * state.row_bytes]
                if size == count:
                    part = view
            state.append(part, size, chunk_want)
            offset += size
        self._client.appended(state)

    async def rows(self, start: int, end: int) -> bytes:
        """The answers to positions [start, end), once they are all here."""
        state = self._state
        while state.received_length < end:
            state.check_open()
            state.changed.clear()
            await state.changed.wait()
        return state.take_rows(start, end)

    def truncate(self, length: int) -> None:
        """Forget positions >= `length`; the next step goes on from there."""
        self._state.check_open()
        self._state.truncate(length)

    async def fork(self, length: int | None = None) -> ChainSession:
        """A new session that begins with our first `length` positions (default: all)."""
        state = self._state
        state.check_open()
        length = state.length if length is None else length
        if not 0 <= length <= state.length:
            raise BadInput(f"can't fork {state.length} positions at {length}")
        parent = Fork(state.id, state.log.rev, length)
        return await self._client.open_session(
            state.encoding, state.span, inner_encoding=state.inner_encoding, parent=parent,
            seed=state, adapter=state.adapter,
        )  # fmt: skip

    def close(self) -> None:
        """Free the session here and at its servers. Idempotent."""
        self._client.end(self._state, SessionClosed("the session was closed"))

    async def __aenter__(self) -> ChainSession:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()


def _check_makes(
    make: Callable[[int, int], Buffer], start: int, sizes: Sequence[int], row_bytes: int
) -> None:
    """Raises:
    BadInput: rows of a wrong size. Whatever else `make` raises.
    """
    for size in sizes:
        made = memoryview(make(start, size)).nbytes
        if made != size * row_bytes:
            raise BadInput(f"{size} rows are {size * row_bytes} bytes, got {made}")
        start += size
