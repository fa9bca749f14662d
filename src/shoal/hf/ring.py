"""Samples round a ring, as text: prompts in, tokens out, the head once for all of a slot.

Sessions, slots and admission are `shoal.client.samples`, the decision how many slots is
`shoal.plan.slots`; here they meet head and sampler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shoal.base.errors import BadInput, ConfigError, NoRouteError, ShoalError
from shoal.base.ids import SessionId
from shoal.client.samples import SampleLimits, run_samples
from shoal.client.turnstile import Turnstile
from shoal.hf.generation import (
    Answer,
    RowScores,
    Token,
    TokenHead,
    TokenLog,
    TokenSampler,
    summarize,
)
from shoal.hf.ring_times import RingPace, Trial, TrialClock, curves_of, measure_ring
from shoal.model.block_rows import PAGE_TOKENS
from shoal.plan.slots import Slots, choose_chunk_rows, samples_at_once

if TYPE_CHECKING:
    from shoal.client.chain_session import ChainSession
    from shoal.client.client import Client
    from shoal.client.session import Payload

PROMPTS_PER_STAGE: Final = 1
"""Prompts that are computed at the same time, for each stage: one chunk each keeps all busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSample:
    """One prompt to continue."""

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampler: TokenSampler

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise BadInput("a prompt has no tokens; give at least one character of text")
        if self.max_new_tokens < 1:
            raise ConfigError(f"can't generate {self.max_new_tokens} tokens; ask for one or more")

    @property
    def tokens(self) -> int:
        """The longest that its session becomes."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RingModel:
    """What of the model is computed here."""

    head: TokenHead
    batch: RowScores
    encoding: str
    eos_ids: Collection[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RingChoice:
    """What a person may fix; None: chosen by measurement."""

    slots: int | None = None
    at_once: int | None = None
    chunk_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RingReader:
    """Who is told what comes of the samples, by number. Called on the event loop."""

    token: Callable[[int, Token], None] = lambda number, token: None
    answer: Callable[[int, Answer], None] = lambda number, answer: None


class Prompts:
    """Whether prompts are being computed: passes with chunks say nothing of decode times."""

    def __init__(self) -> None:
        self._computed = 0
        self._total = 0

    def began(self) -> None:
        """A prompt was sent."""
        self._computed += 1
        self._total += 1

    def ended(self) -> None:
        """Its first token came, or it failed."""
        self._computed -= 1

    def mark(self) -> int | None:
        """Changes with each prompt; None while one is computed."""
        return None if self._computed else self._total


class _TextSample:
    """One sample under way; see `shoal.client.samples.Sample`."""

    def __init__(
        self,
        number: int,
        sample: RingSample,
        model: RingModel,
        reader: RingReader,
        prompts: Prompts,
        follow: Callable[[ChainSession], None],
        heard: Callable[[Token], None],
    ) -> None:
        self._number = number
        self._sample = sample
        self._model = model
        self._reader = reader
        self._prompts = prompts
        self._follow = follow
        self._heard = heard
        self._tokens: list[Token] = []
        self._clock = asyncio.get_running_loop().time
        self._started_s = 0.0
        self._is_prompt = False
        self._log: TokenLog | None = None

    def begin(self, session: ChainSession) -> tuple[Payload, int]:
        """The prompt."""
        self._started_s = self._clock()
        self._is_prompt = True
        self._prompts.began()
        self._log = TokenLog(self._model.head, session.encoding, session.length)
        # Rows are embedded as they leave, on a link that others share: what can't be, fails here.
        ids = self._sample.prompt_ids
        self._model.head.embed((min(ids), max(ids)), session.encoding)
        self._log.append(ids)
        return self._log.rows, len(self._sample.prompt_ids)

    async def take(self, row: bytes, session: ChainSession) -> Payload | None:
        """The token behind the row; None at an end token or the last one asked for."""
        self._follow(session)
        scores = await self._model.batch.logits(row, session.encoding)
        token_id = self._sample.sampler.choose(scores, session.length)
        is_last = (
            len(self._tokens) + 1 >= self._sample.max_new_tokens or token_id in self._model.eos_ids
        )
        token = Token(id=token_id, at_s=self._clock(), is_last=is_last)
        self._prompt_ended()
        self._tokens.append(token)
        self._heard(token)
        self._reader.token(self._number, token)
        if is_last or self._log is None:
            prompt_tokens = len(self._sample.prompt_ids)
            answer = summarize(
                session, self._tokens, prompt_tokens=prompt_tokens, started_s=self._started_s
            )
            self._reader.answer(self._number, answer)
            return None
        self._log.append([token_id])
        return self._log.rows

    def end(self) -> None:
        """It may have failed in its prompt."""
        self._prompt_ended()

    def _prompt_ended(self) -> None:
        if self._is_prompt:
            self._is_prompt = False
            self._prompts.ended()


class Ring:
    """A chain of servers that samples go round. Made by `open_ring`."""

    def __init__(
        self, client: Client, model: RingModel, pace: RingPace, choice: RingChoice
    ) -> None:
        self.pace = pace
        """What is known of the ring's speed; `observe` it, then `choose_again`."""
        self.prompts = Prompts()
        self._client = client
        self._model = model
        self._choice = choice
        self._trials = TrialClock()
        self._turnstile = Turnstile(self._slots)
        self._epochs: dict[SessionId, int] = {}

    @property
    def slots(self) -> Slots:
        """How samples go round now."""
        return self._turnstile.slots

    @property
    def decoding(self) -> int:
        """Samples that decode now."""
        return self._turnstile.samples

    def choose_again(self) -> None:
        """Stages became slower or faster."""
        self._turnstile.choose_again()

    def limits(self, samples: Sequence[RingSample]) -> SampleLimits:
        """How many of these may hold cache at once, and how their prompts travel.

        By the servers that are known: one may have gone since the ring was measured.

        Raises:
            ConfigError: a cache that can't hold even the longest of them.
            NoRouteError: no server of the ring is known any more.
        """
        known = {server.peer: server for server in self._client.view().servers}
        spans = zip(self.pace.peers, self.pace.spans, strict=True)
        stages = [(known[peer], blocks) for peer, blocks in spans if peer in known]
        servers = [server for server, _ in stages]
        if not servers:
            raise NoRouteError("every server of the ring has gone: see shoal ring status")
        longest = max(sample.tokens for sample in samples)
        room = samples_at_once([server.cache_tokens for server in servers], longest, PAGE_TOKENS)
        if not room:
            least = min(server.cache_tokens for server in servers)
            raise ConfigError(
                f"a sample of {longest} tokens (prompt and answer) does not fit: the smallest "
                f"cache of the ring holds {least}. Ask for fewer tokens, or give the nodes more"
            )
        at_once = min(self._choice.at_once or room, room, len(samples))
        prefill_s = max(server.prefill_s_per_block_token * blocks for server, blocks in stages)
        pass_s = self.pace.times.longest_s(self._slots(at_once).rows(at_once))
        rows = choose_chunk_rows(prefill_s, pass_s)
        return SampleLimits(
            at_once=at_once,
            prompts_at_once=min(at_once, PROMPTS_PER_STAGE * len(self.pace.peers)),
            chunk_rows=self._choice.chunk_rows or rows,
        )

    async def run(self, samples: Sequence[RingSample], reader: RingReader) -> dict[int, ShoalError]:
        """Continue all samples; `reader` is told of each token and each end.

        Returns why samples failed, by number; the others ran to their ends.

        Raises:
            ConfigError: a sample that does not fit.
            NoRouteError, PeerError, SessionError: the ring could do none of them.
        """
        self.prompts = Prompts()
        self._epochs.clear()
        works = [
            _TextSample(
                number, sample, self._model, reader, self.prompts, self._follow, self._heard
            )
            for number, sample in enumerate(samples)
        ]
        self._turnstile = Turnstile(self._slots)
        failed = await run_samples(
            lambda: self._client.open_session(self._model.encoding),
            works,
            self._turnstile,
            self.limits(samples),
        )
        if len(failed) == len(samples):
            raise failed[0]
        return failed

    def _follow(self, session: ChainSession) -> None:
        """A session's chain may have changed: blocks were dealt out anew."""
        if self._epochs.get(session.id) == session.epoch:
            return
        self._epochs[session.id] = session.epoch
        chain = session.chain
        if (tuple(s.peer for s in chain), tuple(len(s.span) for s in chain)) == (
            self.pace.peers, self.pace.spans
        ):  # fmt: skip
            return
        self._trials.forget()
        self.pace.move(chain, curves_of(self._client, [stage.peer for stage in chain]))
        self._turnstile.choose_again()

    def _heard(self, token: Token) -> None:
        """See how fast it goes; slots are chosen again when that is known."""
        mark, samples = self.prompts.mark(), self.decoding
        trial = None if mark is None else Trial(samples, self.slots.count, mark)
        if self._trials.came(token.at_s, trial):
            self.choose_again()

    def _slots(self, samples: int) -> Slots:
        measured = self._trials.measured.get(samples, {})
        return self.pace.slots(samples, self._choice.slots, measured)


async def open_ring(
    client: Client, model: RingModel, choice: RingChoice, samples: Sequence[RingSample]
) -> Ring:
    """The ring that the client's servers make, measured for these samples. Takes some seconds.

    Raises:
        ConfigError: no samples.
        NoRouteError, PeerError, SessionError: the ring could not do it.
    """
    pace = await measure_ring(client, model.head, model.batch, model.encoding, len(samples))
    return Ring(client, model, pace, choice)
