"""What `shoal generate` does: join, check, open a session, stream, report."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from shoal.base.ids import peer_text, short
from shoal.cli.joining import SwarmChoice, Visitor, visit, wall_clock
from shoal.cli.models import OpenModel
from shoal.client.client import Client, ClientConfig, open_client
from shoal.discovery.directory import Snapshot
from shoal.hf import connection
from shoal.hf.connection import common_encoding as common_encoding
from shoal.hf.detokenize import Detokenizer
from shoal.hf.generation import Answer, Token, generate, summarize
from shoal.hf.head import Head, load_head
from shoal.hf.sampling import Sampler
from shoal.wire.tensors import INT8_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """What `shoal generate` was asked to do, checked."""

    swarm: SwarmChoice
    prompt: str
    max_new_tokens: int
    sampler: Sampler
    dtype: str | None
    """None: what most servers compute in."""
    is_compressed: bool
    """Whether servers send each other compressed rows."""
    patience_s: float


async def answer_prompt(
    settings: GenerateSettings, model: OpenModel, show: Callable[[str], None]
) -> tuple[str, Answer]:
    """The new text and how it came about; `show` gets the text piece by piece.

    Raises:
        ConfigError: another model than the swarm's, an empty or impossible request.
        NoRouteError, PeerError, SessionError: the swarm could not do it.
    """
    tokenizer = model.source.tokenizer()
    prompt_ids = [int(token) for token in tokenizer(settings.prompt)["input_ids"]]
    detokenizer = Detokenizer(tokenizer)
    pieces: list[str] = []
    tokens: list[Token] = []

    def take(text: str) -> None:
        pieces.append(text)
        show(text)

    async with visit(settings.swarm) as visitor:
        snapshot = visitor.directory.snapshot()
        check_served(snapshot, model)
        encoding = settings.dtype or common_encoding(snapshot, model.name)
        head: Head = load_head(model.source, dtype=encoding)
        started_s = asyncio.get_running_loop().time()
        async with (
            open_swarm_client(visitor, model, settings.patience_s) as client,
            await client.open_session(
                encoding, inner_encoding=INT8_BLOCK if settings.is_compressed else None
            ) as session,
        ):
            async for token in generate(
                session,
                head,
                prompt_ids,
                max_new_tokens=settings.max_new_tokens,
                sampler=settings.sampler,
                eos_ids=model.source.eos_token_ids,
            ):
                tokens.append(token)
                take(detokenizer.push(token.id))
            take(detokenizer.finish())
            answer = summarize(session, tokens, prompt_tokens=len(prompt_ids), started_s=started_s)
    return "".join(pieces), answer


@asynccontextmanager
async def open_swarm_client(
    visitor: Visitor, model: OpenModel, patience_s: float
) -> AsyncIterator[Client]:
    """A client of the visitor's swarm for one model."""
    config = ClientConfig(
        model=model.name,
        num_blocks=model.num_blocks,
        hidden_size=model.hidden_size,
        patience_s=patience_s,
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


def check_served(snapshot: Snapshot, model: OpenModel) -> None:
    """Refuse at once what can't work; see `shoal.hf.connection.check_served`."""
    connection.check_served(
        snapshot, given=model.given, model=model.name, num_blocks=model.num_blocks
    )


def as_dict(text: str, answer: Answer) -> dict[str, Any]:
    """The answer as `--json` prints it; peers as in ready lines, blocks as [start, end]."""
    return {
        "text": text,
        "token_ids": list(answer.token_ids),
        "prompt_tokens": answer.prompt_tokens,
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
        "numerics": answer.numerics,
    }


def summary(answer: Answer) -> str:
    """Speed, chain and repairs, for a person."""
    chain = " -> ".join(f"{short(stage.peer)} {stage.span}" for stage in answer.chain)
    lines = [
        f"{len(answer.token_ids)} tokens, first after "
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
    return "\n".join(lines)
