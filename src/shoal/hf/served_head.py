"""The head of a server that answers thin clients: torch, in a thread of its own.

Rows that wait are computed together, as far as company does not change their bits; the event
loop, which carries other people's rows, never waits for it. Shapes: D hidden, V vocabulary.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch

from shoal.base.errors import (
    BadInput,
    BadOutput,
    ConfigError,
    InternalError,
    SessionClosed,
    ShoalError,
)
from shoal.base.head import Choosing, Chosen, HeadFacts
from shoal.hf.head import Head
from shoal.hf.head_batch import HeadBatch, Progress, find_head_tiles
from shoal.hf.sampling import Sampler
from shoal.hf.score_rules import ScoreOptions, ScoreRules, chances, masked
from shoal.model.row_tiles import TILE_ROWS_MAX
from shoal.model.rows import rows_from_bytes

logger = logging.getLogger(__name__)

_SEED: Final = 20_261_121


class ServedHead:
    """See `HeadBackend`. Made by `serve_head`."""

    def __init__(self, head: Head, batch: HeadBatch, facts: HeadFacts) -> None:
        self.facts = facts
        self._head = head
        self._batch = batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="head")
        self._waiting: list[_Row] = []
        self._working: asyncio.Task[None] | None = None
        self._is_closed = False

    def read_row(self, row: bytes, encoding: str) -> torch.Tensor:
        """(1, D) in the head's own dtype: rows of sessions in other encodings stand beside it.

        Raises:
            BadInput: not one row, or an unknown encoding.
        """
        return rows_from_bytes(row, encoding, 1, self._head.hidden_size).to(self._head.dtype)

    def embed(self, token_ids: Sequence[int], encoding: str, position: int = 0) -> bytes:
        """The tokens' rows for block 0; see `Head.embed`."""
        return self._head.embed(token_ids, encoding, position)

    def begin(
        self, choosing: Choosing, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ) -> _Turn:
        """The choices of one answer.

        Raises:
            BadInput: an option that can't be, or a bias outside the vocabulary.
        """
        return _Turn(self, choosing, prompt_ids, answer_ids)

    async def aclose(self) -> None:
        """End the thread; who waits for a token gets none."""
        self._is_closed = True
        waiting, self._waiting = self._waiting, []
        for row in waiting:
            row.fail(SessionClosed("the head was closed"))
        if self._working is not None:
            await asyncio.gather(self._working, return_exceptions=True)
        self._thread.shutdown(wait=False)

    async def choose(self, row: _Row) -> Chosen:
        """The token after one row, with whoever else waits."""
        if self._is_closed:
            raise SessionClosed("the head was closed")
        self._waiting.append(row)
        if self._working is None or self._working.done():
            self._working = asyncio.get_running_loop().create_task(self._work(), name="head")
        return await row.result

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # rows of one frame wake their tasks in one turn
        while self._waiting:
            rows = [row for row in self._waiting if not row.result.done()]
            self._waiting = rows[TILE_ROWS_MAX:]
            rows = rows[:TILE_ROWS_MAX]
            if not rows:
                continue
            try:
                outcomes = await loop.run_in_executor(self._thread, self._compute, rows)
            except Exception as error:  # noqa: BLE001 - each asker gets it
                for row in rows:
                    row.fail(error)
                continue
            for row, outcome in zip(rows, outcomes, strict=True):
                row.tell(outcome)

    def _compute(self, rows: Sequence[_Row]) -> list[Chosen | ShoalError]:
        """On the thread."""
        with torch.inference_mode():
            scores = self._batch.scores([row.hidden for row in rows])
            return [_outcome(row, one) for row, one in zip(rows, scores, strict=True)]


@dataclass(eq=False, slots=True)
class _Row:
    """One row that waits for its token."""

    turn: _Turn
    hidden: torch.Tensor
    position: int
    allowed: bytes | None
    result: asyncio.Future[Chosen]

    def tell(self, outcome: Chosen | ShoalError) -> None:
        if isinstance(outcome, ShoalError):
            self.fail(outcome)
        elif not self.result.done():
            self.result.set_result(outcome)

    def fail(self, error: Exception) -> None:
        if not self.result.done():
            self.result.set_exception(error)


def _outcome(row: _Row, scores: torch.Tensor) -> Chosen | ShoalError:
    try:
        return row.turn.pick(scores, row.position, row.allowed)
    except ShoalError as error:  # of this row alone
        return error
    except Exception:  # the same: company of a row that shows a bug of ours goes on
        logger.exception("no token chosen position=%d", row.position)
        return InternalError("the head failed to choose a token; its log says more")


class _Turn:
    """See `HeadTurn`."""

    def __init__(
        self,
        served: ServedHead,
        choosing: Choosing,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
    ) -> None:
        try:
            self._sampler = Sampler(
                temperature=choosing.temperature,
                seed=choosing.seed,
                top_k=choosing.top_k,
                top_p=choosing.top_p,
                min_p=choosing.min_p,
            )
        except ConfigError as error:
            raise BadInput(error.detail) from error
        options = ScoreOptions(
            repetition=choosing.repetition,
            presence=choosing.presence,
            frequency=choosing.frequency,
            bias=dict(choosing.bias),
        )
        self._served = served
        self._num_best = choosing.num_best
        self._rules = ScoreRules(options, prompt_ids, served.facts.vocab_size, answer_ids)

    async def choose(
        self, row: bytes, encoding: str, position: int, allowed: bytes | None = None
    ) -> Chosen:
        """See `HeadTurn.choose`."""
        hidden = self._served.read_row(row, encoding)
        result = asyncio.get_running_loop().create_future()
        return await self._served.choose(_Row(self, hidden, position, allowed, result))

    def pick(self, scores: torch.Tensor, position: int, allowed: bytes | None) -> Chosen:
        """The token by the model's (V,) scores. On the head's thread.

        Raises:
            BadOutput: scores that are not numbers, or no token is allowed.
        """
        if bool(torch.isnan(scores).any()):
            raise BadOutput(f"the model's scores of position {position} are not numbers")
        wanted = self._rules.apply(scores)
        if allowed is not None:
            wanted = masked(wanted, allowed)
            if not bool(torch.isfinite(wanted).any()):
                raise BadInput("no token is allowed")
        token_id = self._sampler.choose(wanted, position)
        self._rules.add(token_id)
        if self._num_best is None:
            return Chosen(id=token_id)
        told = chances(scores, token_id, self._num_best)
        return Chosen(id=token_id, chance=told.chosen, best=told.best)


def serve_head(head: Head, encoding: str, progress: Progress | None = None) -> ServedHead:
    """A head that is ready to answer: its row counts and its class are found first.

    Takes many calls of the head; not on an event loop.
    """
    batch = HeadBatch(head, find_head_tiles(head, progress))
    facts = HeadFacts(
        vocab_size=head.vocab_size, encoding=encoding, numerics=_numerics(head, batch, encoding)
    )
    return ServedHead(head, batch, facts)


def _numerics(head: Head, batch: HeadBatch, encoding: str) -> str:
    """The dtype, and a hash of the scores of seeded rows: machines differ in their bits."""
    generator = torch.Generator().manual_seed(_SEED)
    rows = torch.randn((3, head.hidden_size), generator=generator).to(head.dtype)
    scores = batch.scores([rows[index : index + 1] for index in range(3)])
    digest = hashlib.blake2b(digest_size=8, person=b"shoal-head")
    digest.update(scores.contiguous().numpy().tobytes())
    return f"{encoding}-{digest.hexdigest()}"
