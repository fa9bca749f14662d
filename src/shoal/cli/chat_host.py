"""What a chat needs behind it: the swarm, a client, the model's head, in a background loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, wait
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from shoal.cli.adapters import choose_adapter
from shoal.cli.answering import check_model, common_encoding, open_swarm_client
from shoal.cli.chatting import Conversation, behind, template_renderer
from shoal.cli.joining import SwarmChoice, Visitor, visit
from shoal.cli.models import OpenModel
from shoal.cli.peer_weights import fetch_for_client
from shoal.cli.speakers import ChainSpeaker, Speaker, ThinSpeaker
from shoal.cli.thin_host import open_swarm_thin_client
from shoal.client.waiting import OnWaiting
from shoal.hf.head import load_head
from shoal.hf.loop import BackgroundLoop
from shoal.wire.tensors import INT8_BLOCK

CLOSE_S: Final = 5.0
"""How long the good-bye to the servers may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTarget:
    """Whom to talk with, and how."""

    swarm: SwarmChoice
    model: OpenModel
    template: str | None
    dtype: str | None
    """None: what most servers compute in."""
    is_compressed: bool
    patience_s: float
    on_waiting: OnWaiting | None = None
    standby: int = 0
    """Standbys for each hop."""
    is_thin: bool = False
    """Whether a server embeds and chooses tokens."""
    adapter: str | None = None
    """The LoRA adapter that all tokens go through, or a prompt, as the person named it."""


def fetch_model(
    given: str, swarm: SwarmChoice, limit_bytes: int, *, is_thin: bool = False
) -> OpenModel:
    """What a client needs of the model, fetched from the swarm.

    Raises:
        ModelError, ConfigError, PeerError: it can't be had; says why.
    """
    return asyncio.run(fetch_for_client(given, swarm, limit_bytes, is_thin=is_thin))


@contextmanager
def hosting(target: ChatTarget) -> Iterator[tuple[BackgroundLoop, Conversation]]:
    """A conversation without turns, and the loop that it lives in.

    Raises:
        ConfigError: another model than the swarm's, or no chat template.
        PeerError: the swarm can't be reached.
    """
    tokenizer = target.model.source.tokenizer()
    render = template_renderer(tokenizer, target.template)
    ending = asyncio.Event()
    opened: Future[Conversation] = Future()
    with closing(BackgroundLoop("chat")) as background:

        async def host() -> None:
            async with visit(target.swarm) as visitor:
                check_model(visitor.directory.snapshot(), target.model)
                async with _speaking(target, visitor) as (speaker, ids_before):
                    conversation = Conversation(
                        speaker,
                        tokenizer,
                        behind(ids_before, render),
                        end_tokens(target.model, tokenizer),
                    )
                    opened.set_result(conversation)
                    await ending.wait()
                    conversation.close()

        hosted = background.start(host())
        hosted.add_done_callback(partial(_hand_on_failure, opened))
        yield background, opened.result()
        background.call_soon(ending.set)
        done, _ = wait([hosted], CLOSE_S)
        if done:
            hosted.result()


@asynccontextmanager
async def _speaking(
    target: ChatTarget, visitor: Visitor
) -> AsyncIterator[tuple[Speaker, tuple[int, ...]]]:
    """Who makes the tokens: this process, or a server with a head; what stands before them."""
    model, snapshot = target.model, visitor.directory.snapshot()
    encoding = target.dtype or common_encoding(snapshot, model.name)
    adapter = choose_adapter(target.adapter, model, snapshot)
    if target.is_thin:
        async with open_swarm_thin_client(
            visitor, model, target.patience_s, encoding=encoding,
            is_compressed=target.is_compressed, on_waiting=target.on_waiting,
        ) as thin:  # fmt: skip
            yield ThinSpeaker(thin, adapter.name), ()
        return
    head = adapter.around(load_head(model.source, dtype=encoding))
    ids_before = adapter.ids_before(int(model.source.config.vocab_size))
    async with open_swarm_client(
        visitor, model, target.patience_s, target.on_waiting, target.standby
    ) as client:
        inner = INT8_BLOCK if target.is_compressed else None
        speaker = ChainSpeaker(client, head, encoding, inner, adapter.offered_by(client))
        yield speaker, ids_before


def end_tokens(model: OpenModel, tokenizer: object) -> frozenset[int]:
    """Tokens that end an answer: those of the model, and the one of the chat template."""
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(model.source.eos_token_ids) | ({own} if isinstance(own, int) else set())


def _hand_on_failure(opened: Future[Conversation], hosted: Future[None]) -> None:
    """Whoever waits for the conversation learns why there is none."""
    error = None if hosted.cancelled() else hosted.exception()
    if error is not None and not opened.done():
        opened.set_exception(error)
