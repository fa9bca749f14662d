"""What `shoal generate` does: join, check, open a session, stream, report."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.base.errors import NoRouteError
from shoal.base.ids import peer_text, short
from shoal.cli.adapters import ChosenAdapter, adapter_to_resume, choose_adapter
from shoal.cli.answer_file import AnswerFile, keeping, name_of
from shoal.cli.joining import SwarmChoice, Visitor, visit, wall_clock
from shoal.cli.models import OpenModel
from shoal.cli.speakers import ChainSpeaker, Speaker, ThinSpeaker
from shoal.cli.thin_host import open_swarm_thin_client
from shoal.cli.waiting import with_hint
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.client.session import Move
from shoal.client.tending import TendConfig
from shoal.client.waiting import OnWaiting
from shoal.discovery.directory import Snapshot
from shoal.hf import connection
from shoal.hf.connection import common_encoding as common_encoding
from shoal.hf.detokenize import Detokenizer
from shoal.hf.generation import Answer, Speed, Token, summarize
from shoal.hf.head import load_head
from shoal.hf.sampling import Sampler
from shoal.hf.saved_answer import SavedAnswer, block_classes
from shoal.wire.tensors import INT8_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt to continue, and how."""

    prompt: str
    max_new_tokens: int
    sampler: Sampler
    dtype: str | None
    """None: what most servers compute in."""
    is_compressed: bool
    """Whether servers send each other compressed rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """What `shoal generate` was asked to do, checked."""

    swarm: SwarmChoice
    task: Question | SavedAnswer
    """A new answer, or one to go on with."""
    patience_s: float
    save: Path | None = None
    """The file that keeps the answer while it comes."""
    on_waiting: OnWaiting | None = None
    standby: int = 0
    """Standbys for each hop."""
    is_thin: bool = False
    """Whether a server embeds and chooses tokens."""
    adapter: str | None = None
    """The LoRA adapter that all tokens go through, as the person named it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An answer as text and as tokens, the part that was there before included."""

    text: str
    answer: Answer
    num_resumed: int
    """New tokens that were in the file already."""


class _Page:
    """Text from tokens, shown piece by piece."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._show = show
        self._pieces: list[str] = []

    def add(self, token_id: int) -> None:
        self._take(self._detokenizer.push(token_id))

    def finish(self) -> str:
        self._take(self._detokenizer.finish())
        return "".join(self._pieces)

    def _take(self, text: str) -> None:
        self._pieces.append(text)
        self._show(text)


async def answer_prompt(
    settings: GenerateSettings, model: OpenModel, show: Callable[[str], None]
) -> Written:
    """The new text and how it came about; `show` gets the text piece by piece.

    Of an answer that is resumed, the text so far comes first.

    Raises:
        ConfigError: another model than the swarm's, an empty or impossible request, or a
            file that can't be written.
        NoRouteError, PeerError, SessionError: the swarm could not do it.
    """
    task, eos_ids = settings.task, model.source.eos_token_ids
    tokenizer = model.source.tokenizer()
    page = _Page(tokenizer, show)
    if isinstance(task, SavedAnswer):
        for token_id in task.token_ids:
            page.add(token_id)
        if task.is_complete(eos_ids):
            return Written(
                text=page.finish(), answer=_as_it_is(task), num_resumed=len(task.token_ids)
            )
    async with visit(settings.swarm) as visitor:
        snapshot = visitor.directory.snapshot()
        check_model(snapshot, model)
        begun = task
        if isinstance(begun, Question):
            prompt_ids = [int(token) for token in tokenizer(begun.prompt)["input_ids"]]
            adapter = choose_adapter(settings.adapter, model, snapshot)
            prompt_ids[:0] = adapter.ids_before(int(model.source.config.vocab_size))
            begun = _begin(begun, prompt_ids, model, snapshot, adapter)
        else:
            adapter = adapter_to_resume(settings.adapter, begun, model, snapshot)
        async with (
            keeping(settings.save, begun) as file,
            _speaking(settings, model, visitor, begun, adapter) as speaker,
        ):
            try:
                answer = await _go_on(begun, speaker, eos_ids, page, file)
            except NoRouteError as error:
                raise with_hint(error, model.given) from error
    return Written(text=page.finish(), answer=answer, num_resumed=len(begun.token_ids))


def _begin(
    question: Question,
    prompt_ids: list[int],
    model: OpenModel,
    snapshot: Snapshot,
    adapter: ChosenAdapter,
) -> SavedAnswer:
    """An answer without tokens."""
    return SavedAnswer(
        model=model.name,
        given=name_of(model.given),
        num_blocks=model.num_blocks,
        prompt_ids=tuple(prompt_ids),
        max_new_tokens=question.max_new_tokens,
        sampler=question.sampler,
        encoding=question.dtype or common_encoding(snapshot, model.name),
        is_compressed=question.is_compressed,
        adapter=adapter.name.hex(),
    )


@asynccontextmanager
async def _speaking(
    settings: GenerateSettings,
    model: OpenModel,
    visitor: Visitor,
    begun: SavedAnswer,
    adapter: ChosenAdapter,
) -> AsyncIterator[Speaker]:
    """Who makes the tokens: this process, or a server with a head."""
    patience_s, on_waiting = settings.patience_s, settings.on_waiting
    if settings.is_thin:
        async with open_swarm_thin_client(
            visitor, model, patience_s, encoding=begun.encoding,
            is_compressed=begun.is_compressed, on_waiting=on_waiting,
        ) as thin:  # fmt: skip
            yield ThinSpeaker(thin, adapter.name)
        return
    head = adapter.around(load_head(model.source, dtype=begun.encoding))
    async with open_swarm_client(
        visitor, model, patience_s, on_waiting, settings.standby
    ) as client:
        inner = INT8_BLOCK if begun.is_compressed else None
        yield ChainSpeaker(client, head, begun.encoding, inner, adapter.offered_by(client))


async def _go_on(
    begun: SavedAnswer,
    speaker: Speaker,
    eos_ids: Collection[int],
    page: _Page,
    file: AnswerFile | None,
) -> Answer:
    """The rest of the answer; what comes back has all of it."""
    tokens: list[Token] = []
    started_s = asyncio.get_running_loop().time()
    async with await speaker.open_session() as session:

        def so_far() -> SavedAnswer:
            classes = block_classes(session.chain, speaker.view())
            return begun.grown([token.id for token in tokens], session.numerics, classes)

        async for token in speaker.tokens(
            session,
            begun.prompt_ids,
            max_new_tokens=begun.tokens_left,
            sampler=begun.sampler,
            eos_ids=eos_ids,
            past_ids=begun.token_ids,
        ):
            tokens.append(token)
            page.add(token.id)
            if file is not None:
                file.grew(so_far)
        answer = summarize(
            session, tokens, prompt_tokens=len(begun.prompt_ids), started_s=started_s
        )
        whole = so_far()
    return replace(answer, token_ids=whole.token_ids, numerics=whole.numerics)


def _as_it_is(saved: SavedAnswer) -> Answer:
    """An answer to which nothing was added."""
    return Answer(
        token_ids=saved.token_ids,
        prompt_tokens=len(saved.prompt_ids),
        speed=Speed(time_to_first_token_s=0.0, tokens_per_s=0.0),
        chain=(),
        recoveries=(),
        numerics=saved.numerics,
    )


@asynccontextmanager
async def open_swarm_client(
    visitor: Visitor,
    model: OpenModel,
    patience_s: float,
    on_waiting: OnWaiting | None = None,
    standby: int = 0,
) -> AsyncIterator[Client]:
    """A client of the visitor's swarm for one model."""
    config = ClientConfig(
        model=model.name,
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        patience_s=patience_s,
        on_waiting=on_waiting,
        tending=TendConfig(standby=standby),
    )
    async with open_client(
        visitor.identity,
        visitor.transport,
        visitor.swarm_pass,
        visitor.directory,
        config,
        rng=random.SystemRandom(),
        wall_clock=wall_clock,
    ) as client:
        yield client


def check_model(snapshot: Snapshot, model: OpenModel) -> None:
    """Refuse at once what can't work; see `shoal.hf.connection.check_model`.

    Blocks that nobody has are waited for.
    """
    connection.check_model(
        snapshot, given=model.given, model=model.name, num_blocks=model.num_blocks
    )


def as_dict(text: str, answer: Answer, num_resumed: int = 0) -> dict[str, Any]:
    """The answer as `--json` prints it; peers as in ready lines, blocks as [start, end]."""
    return {
        "text": text,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
        "resumed_tokens": num_resumed,
        "time_to_first_token_s": answer.speed.time_to_first_token_s,
        "tokens_per_s": answer.speed.tokens_per_s,
        "chain": [
            {"peer": peer_text(stage.peer), "blocks": [stage.span.start, stage.span.end]}
            for stage in answer.chain
        ],
        "recoveries": [
            {
                "position": recovery.position,
                "lost": [peer_text(peer) for peer in recovery.lost],
                "replacement": [peer_text(peer) for peer in recovery.replacement],
                "replayed_tokens": recovery.replayed_tokens,
                "pause_s": recovery.pause_s,
            }
            for recovery in answer.recoveries
        ],
        "moves": [
            {
                "position": move.position,
                "left": [peer_text(peer) for peer in move.left],
                "entered": [peer_text(peer) for peer in move.entered],
                "reason": move.reason,
                "prepared_s": move.prepared_s,
            }
            for move in answer.moves
        ],
        "numerics": answer.numerics,
    }


def summary(answer: Answer, num_resumed: int = 0) -> str:
    """Speed, chain and repairs, for a person."""
    if not answer.chain:
        return f"{len(answer.token_ids)} tokens; the answer was complete"
    chain = " -> ".join(f"{short(stage.peer)} {stage.span}" for stage in answer.chain)
    before = f" ({num_resumed} of them before)" if num_resumed else ""
    lines = [
        f"{len(answer.token_ids)} tokens{before}, first after "
        f"{answer.speed.time_to_first_token_s:.2f} s, then "
        f"{answer.speed.tokens_per_s:.1f} tokens/s",
        f"chain: {chain}",
    ]
    for recovery in answer.recoveries:
        lost = ", ".join(short(peer) for peer in recovery.lost)
        found = ", ".join(short(peer) for peer in recovery.replacement)
        lines.append(
            f"repaired at position {recovery.position}: {lost} replaced by {found}, "
            f"{recovery.replayed_tokens} tokens replayed, {recovery.pause_s:.2f} s"
        )
    lines += [move_text(move) for move in answer.moves]
    return "\n".join(lines)


def move_text(move: Move) -> str:
    """One planned change of the chain, for a person."""
    left = ", ".join(short(peer) for peer in move.left)
    entered = ", ".join(short(peer) for peer in move.entered)
    why = {"leaving": "which leaves", "slow": "which became slow"}[move.reason]
    return (
        f"moved at position {move.position}: from {left}, {why}, to {entered}, "
        f"ready after {move.prepared_s:.2f} s, no pause"
    )
