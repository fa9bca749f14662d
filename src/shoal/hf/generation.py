"""One sequence, token by token: embed, run the chain, apply the head, sample.

The session's log holds token ids, not embeddings: what it sends again after a repair is
embedded again. Head and sampler run on the caller's event loop; between tokens nothing
else of this session has to run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from shoal.base.errors import BadInput, ConfigError
from shoal.client.token_log import TokenLog as TokenLog
from shoal.plan.view import Stage
from shoal.wire.messages import WANT_NONE

if TYPE_CHECKING:
    import torch

    from shoal.client.chain_session import ChainSession
    from shoal.client.session import Move, Recovery


class TokenHead(Protocol):
    """What generation needs of a model's head: see `shoal.hf.head.Head`."""

    def embed(self, token_ids: Sequence[int], encoding: str, position: int = 0) -> bytes:
        """The rows of these tokens as bytes; the first is at `position`."""

    def logits(self, rows: bytes, encoding: str) -> torch.Tensor:
        """Logits of each row, shape (rows, vocabulary)."""


class RowScores(Protocol):
    """The head for one row at a time: see `shoal.hf.head_batch.HeadBatch`."""

    async def logits(self, row: bytes, encoding: str) -> torch.Tensor:
        """Logits of this row, shape (vocabulary,)."""


class TokenSampler(Protocol):
    """Chooses the next token: see `shoal.hf.sampling.Sampler`."""

    def choose(self, logits: torch.Tensor, position: int) -> int:
        """The token at `position` of the whole sequence, given its (vocabulary,) scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One generated token."""

    id: int
    at_s: float
    """Loop time when it was chosen."""
    is_last: bool
    """Whether it ends the sequence: an end token, or the last one asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How long an answer took, by loop time."""

    time_to_first_token_s: float
    """From `started_s` to the first token."""
    tokens_per_s: float
    """Decode speed: tokens after the first, per second since the first. 0 for one token."""


class Happened(Protocol):
    """What a session can tell of itself: see `shoal.client.chain_session.ChainSession`."""

    @property
    def chain(self) -> tuple[Stage, ...]:
        """Who runs which blocks now."""

    @property
    def recoveries(self) -> tuple[Recovery, ...]:
        """The repairs so far."""

    @property
    def moves(self) -> tuple[Move, ...]:
        """The planned changes of the chain so far."""

    @property
    def numerics(self) -> str:
        """What repairs did to the numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A whole answer and how it came about."""

    token_ids: tuple[int, ...]
    """New tokens only; an end token is included."""
    prompt_tokens: int
    speed: Speed
    chain: tuple[Stage, ...]
    """At the end."""
    recoveries: tuple[Recovery, ...]
    numerics: str
    """`exact`, `same-class` or `crossed`."""
    moves: tuple[Move, ...] = ()


async def generate(
    session: ChainSession,
    head: TokenHead,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: TokenSampler,
    eos_ids: Collection[int] = (),
    batch: RowScores | None = None,
    past_ids: Sequence[int] = (),
) -> AsyncIterator[Token]:
    """New tokens after `prompt_ids`, as they come; an end token is given, then it ends.

    `past_ids` are new tokens that an earlier session gave: they are sent again in the calls in
    which they were run then, so that exact servers compute the same bits. They are not given
    again and don't count.

    With `batch`, shared by several of these, the head runs once for all rows that came
    together. The session is appended to where it stands and stays open; all tokens but the last
    one are in it afterwards.

    Raises:
        BadInput: an empty prompt.
        ConfigError: less than one new token.
        SessionTooLong, NoRouteError, PeerError: as `ChainSession.step`.
    """
    if not prompt_ids:
        raise BadInput("the prompt has no tokens; give at least one character of text")
    if max_new_tokens < 1:
        raise ConfigError(f"can't generate {max_new_tokens} tokens; ask for at least one")
    clock = asyncio.get_running_loop().time
    encoding = session.encoding
    log = TokenLog(head, encoding, session.length)
    rows = await _read(session, log, prompt_ids, past_ids)
    for left in range(max_new_tokens - 1, -1, -1):
        scores = (
            head.logits(rows, encoding)[-1] if batch is None else await batch.logits(rows, encoding)
        )
        token_id = sampler.choose(scores, session.length)
        is_last = left == 0 or token_id in eos_ids
        yield Token(id=token_id, at_s=clock(), is_last=is_last)
        if is_last:
            return
        log.append([token_id])
        rows = await session.step(log.rows, 1)


async def _read(
    session: ChainSession, log: TokenLog, prompt_ids: Sequence[int], past_ids: Sequence[int]
) -> bytes:
    """Run the prompt and what came after it; the last row's answer."""
    log.append([*prompt_ids, *past_ids])
    if not past_ids:
        return await session.step(log.rows, len(prompt_ids))
    session.append(log.rows, len(prompt_ids), want=WANT_NONE)
    for _ in past_ids[:-1]:
        session.append(log.rows, 1, want=WANT_NONE)
    return await session.step(log.rows, 1)


def iterate(runner: asyncio.Runner, tokens: AsyncIterator[Token]) -> Iterator[Token]:
    """The same tokens for code that is not async; the loop runs only while this waits.

    A consumer that takes longer than some seconds per token should rather collect all of
    them at once: a loop that stands still answers nobody.
    """

    async def following() -> Token | None:
        return await anext(tokens, None)

    while (token := runner.run(following())) is not None:
        yield token


async def collect(
    session: ChainSession, tokens: AsyncIterator[Token], *, prompt_tokens: int, started_s: float
) -> Answer:
    """Everything that `generate` gives, with what it cost since `started_s` (loop time)."""
    taken = [token async for token in tokens]
    return summarize(session, taken, prompt_tokens=prompt_tokens, started_s=started_s)


def summarize(
    session: Happened, tokens: Sequence[Token], *, prompt_tokens: int, started_s: float
) -> Answer:
    """The answer that these tokens of `session` make."""
    return Answer(
        token_ids=tuple(token.id for token in tokens),
        prompt_tokens=prompt_tokens,
        speed=measure(tokens, started_s),
        chain=session.chain,
        recoveries=session.recoveries,
        numerics=session.numerics,
        moves=session.moves,
    )


def measure(tokens: Sequence[Token], started_s: float) -> Speed:
    """Time to the first token, and decode tokens per second without it."""
    if not tokens:
        return Speed(time_to_first_token_s=0.0, tokens_per_s=0.0)
    decode_s = tokens[-1].at_s - tokens[0].at_s
    return Speed(
        time_to_first_token_s=tokens[0].at_s - started_s,
        tokens_per_s=(len(tokens) - 1) / decode_s if decode_s > 0 else 0.0,
    )
