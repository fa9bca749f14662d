"""What answers where. `Gateway` is an ASGI application; nothing here knows about sockets."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from starlette.responses import FileResponse
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from shoal.gateway import meter as metering
from shoal.gateway.answering import token_text
from shoal.gateway.bodies import ChatBody, CompletionBody, Sampling, read_body
from shoal.gateway.chat import ChatForm, ChatStream, ChatWhole
from shoal.gateway.closing import Closing
from shoal.gateway.completions import CompletionForm, CompletionStream, CompletionWhole, Part
from shoal.gateway.encoding import Encoder
from shoal.gateway.engine import Done, Engine, Job, Sink, check_vocabulary
from shoal.gateway.errors import ApiError, as_api_error
from shoal.gateway.http import (
    Bodies,
    CallerGone,
    EventStream,
    json_bytes,
    send_whole,
    while_connected,
)
from shoal.gateway.keys import Allowance, Caller
from shoal.gateway.line import Line
from shoal.gateway.meter import Meter
from shoal.gateway.objects import Envelope
from shoal.gateway.requests import (
    Settings,
    chat_settings,
    completion_settings,
    prompts,
    talk,
)

logger = logging.getLogger(__name__)

STATIC: Final = Path(__file__).with_name("static")

SEED_BITS: Final = 62
"""Seeds of requests that bring none, with room for one more per choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The model that is served, for `/v1/models` and the page."""

    names: tuple[str, ...]
    """The first one is what answers say; requests may use any, or none."""
    created: int
    """Unix time."""
    num_blocks: int
    context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a gateway is made of."""

    facts: ModelFacts
    engine: Engine
    encoder: Encoder
    line: Line
    meter: Meter
    wall_clock: Callable[[], float]
    body_bytes_max: int
    missing_blocks: Callable[[], Sequence[tuple[int, int]]]
    """Blocks that nobody serves now, as (start, end)."""
    adapters: Callable[[], Mapping[str, bytes]] = dict
    """Names of the LoRA adapters that servers have now, by label: models `NAME:LABEL`."""
    closing: Closing = field(default_factory=Closing)
    """Ends what is at work when the gateway stops."""


class Api:
    """The endpoints of one model."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bodies = Bodies(parts.body_bytes_max)
        self._allowance = Allowance()
        self._text_of = token_text(parts.engine.served.words.tokenizer)

    def routes(self, more: Sequence[BaseRoute] = ()) -> Router:
        """All paths; `more` are other pages."""
        return Router(
            [
                Route("/v1/chat/completions", _Asgi(self.chat), methods=["POST"]),
                Route("/v1/completions", _Asgi(self.completions), methods=["POST"]),
                Route("/v1/models", _Asgi(self.models), methods=["GET"]),
                Route("/v1/models/{name:path}", _Asgi(self.model), methods=["GET"]),
                Route("/health", _Asgi(self.health), methods=["GET"]),
                Route("/metrics", _Asgi(self.metrics), methods=["GET"]),
                *more,
                Route("/", _Asgi(self.page), methods=["GET"]),
                Mount("/static", StaticFiles(directory=STATIC)),
            ]
        )

    # --- answers -----------------------------------------------------------------------

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        async with self._bodies.held(scope, receive) as data:
            body = read_body(data, ChatBody)
            caller = self._admit(scope, body)
            settings, wanted = chat_settings(body, _new_seed), talk(body)
            way = self._parts.encoder.way if wanted.tools else None
            ids = await while_connected(receive, self._parts.encoder.talk(wanted))
        keeps_special = way is not None and not way.closing
        job = self._job(caller, body, ids, settings, keeps_special=keeps_special)
        form = ChatForm(
            envelope=self._envelope("chatcmpl", "chat.completion", body),
            num_choices=settings.num_choices,
            way=way,
            is_call_forced=wanted.is_call_forced,
            has_logprobs=settings.num_best is not None,
            text_of=self._text_of,
            new_id=lambda: f"call_{secrets.token_hex(12)}",
        )

        async def work() -> None:
            if not body.stream:
                whole = ChatWhole(form)
                (done,) = await self._answer(caller, [(job, whole)])
                await send_whole(send, json_bytes(whole.object(done)))
                return
            stream = EventStream(send)
            events = ChatStream(form, stream, has_usage=_wants_usage(body))
            async with _told_in_stream(stream, scope), stream.kept_alive():
                (done,) = await self._answer(caller, [(job, events)], stream)
                await events.end(done)

        await while_connected(receive, work())

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions."""
        async with self._bodies.held(scope, receive) as data:
            body = read_body(data, CompletionBody)
            caller = self._admit(scope, body)
            settings, given = completion_settings(body, _new_seed), prompts(body)
            jobs = await while_connected(receive, self._jobs(caller, body, given, settings))
        form = self._completion_form(body, settings, given)

        async def work() -> None:
            taker: CompletionWhole | CompletionStream
            if not body.stream:
                taker = whole = CompletionWhole(form)
                dones = await self._answer(caller, self._parted(jobs, taker, settings))
                await send_whole(send, json_bytes(whole.object(dones)))
                return
            stream = EventStream(send)
            taker = events = CompletionStream(form, stream, has_usage=_wants_usage(body))
            async with _told_in_stream(stream, scope), stream.kept_alive():
                dones = await self._answer(caller, self._parted(jobs, taker, settings), stream)
                await events.end(dones)

        await while_connected(receive, work())

    def _admit(self, scope: Scope, body: Sampling) -> Caller:
        caller: Caller = scope["shoal.caller"]
        self._allowance.take_request(caller, asyncio.get_running_loop().time())
        names = self._parts.facts.names
        if body.model and body.model not in names and not self._adapter(body):
            raise ApiError(
                404, f"there is no model {body.model!r} here; this gateway serves {names[0]}",
                code="model_not_found", param="model",
            )  # fmt: skip
        return caller

    def _adapter(self, body: Sampling) -> bytes:
        """The adapter that is asked for as `NAME:LABEL`; empty: none, or none of that name."""
        names, given = self._parts.facts.names, body.model or ""
        base, _, label = given.rpartition(":")
        if given in names or base not in names:
            return b""
        return self._parts.adapters().get(label, b"")

    def _job(
        self,
        caller: Caller,
        body: Sampling,
        ids: Sequence[int],
        settings: Settings,
        *,
        keeps_special: bool,
    ) -> Job:
        adapter = self._adapter(body)
        # Before it stands in line with it.
        self._parts.engine.check_length(len(ids), settings.max_tokens)
        clock = asyncio.get_running_loop().time
        return Job(
            on_used=lambda count: self._allowance.use_tokens(caller, count, clock()),
            owner=f"{caller.name} {adapter.hex()}" if adapter else caller.name,
            prompt_ids=tuple(ids),
            settings=settings,
            keeps_special=keeps_special,
            adapter=adapter,
        )

    async def _jobs(
        self,
        caller: Caller,
        body: Sampling,
        given: Sequence[str | list[int]],
        settings: Settings,
    ) -> list[Job]:
        jobs = []
        for prompt in given:
            ids = await self._parts.encoder.text(prompt) if isinstance(prompt, str) else prompt
            if not ids:
                raise ApiError(400, "the prompt is empty", param="prompt")
            check_vocabulary(ids, self._parts.engine.served.words.vocab_size)
            jobs.append(self._job(caller, body, ids, settings, keeps_special=False))
        return jobs

    def _completion_form(
        self, body: CompletionBody, settings: Settings, given: Sequence[str | list[int]]
    ) -> CompletionForm:
        tokenizer = self._parts.engine.served.words.tokenizer
        texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in given]
        return CompletionForm(
            envelope=self._envelope("cmpl", "text_completion", body),
            echoes=[
                text if body.echo else "" for text in texts for _ in range(settings.num_choices)
            ],
            has_logprobs=settings.num_best is not None,
            text_of=self._text_of,
        )

    @staticmethod
    def _parted(
        jobs: Sequence[Job], whole: CompletionWhole | CompletionStream, settings: Settings
    ) -> list[tuple[Job, Sink]]:
        return [(job, Part(whole, at * settings.num_choices)) for at, job in enumerate(jobs)]

    async def _answer(
        self, caller: Caller, jobs: Sequence[tuple[Job, Sink]], stream: EventStream | None = None
    ) -> list[Done]:
        """All jobs at the same time, once there are places for them."""
        return await self._parts.closing.within(self._answer_all(caller, jobs, stream))

    async def _answer_all(
        self, caller: Caller, jobs: Sequence[tuple[Job, Sink]], stream: EventStream | None
    ) -> list[Done]:
        engine, clock = self._parts.engine, asyncio.get_running_loop().time
        places = sum(job.settings.num_choices for job, _ in jobs)
        asked_s = clock()
        async with self._parts.line.place(caller, places):
            self._parts.meter.waiting_s.observe(clock() - asked_s)
            if stream is not None:
                stream.may_open = True
            works = [asyncio.ensure_future(engine.answer(job, sink)) for job, sink in jobs]
            try:
                dones = await asyncio.gather(*works)
            finally:
                for work in works:
                    work.cancel()
                await asyncio.gather(*works, return_exceptions=True)
        return dones

    def _envelope(self, prefix: str, kind: str, body: Sampling) -> Envelope:
        is_chunk = bool(body.stream) and kind == "chat.completion"
        return Envelope(
            id=f"{prefix}-{secrets.token_hex(12)}",
            kind=f"{kind}.chunk" if is_chunk else kind,
            model=body.model if body.model and self._adapter(body) else self._parts.facts.names[0],
            created=int(self._parts.wall_clock()),
        )

    # --- facts -------------------------------------------------------------------------

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/models."""
        data = [self._model_object(), *map(self._model_object, self._parts.adapters())]
        await send_whole(send, json_bytes({"object": "list", "data": data}))

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /v1/models/NAME."""
        name = scope["path_params"]["name"]
        base, _, label = name.rpartition(":")
        if name in self._parts.facts.names:
            found = self._model_object()
        elif base in self._parts.facts.names and label in self._parts.adapters():
            found = self._model_object(label)
        else:
            raise ApiError(404, f"there is no model {name!r} here", code="model_not_found")
        await send_whole(send, json_bytes(found))

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /health: 200, or 503 and the blocks that nobody serves."""
        missing = [list(span) for span in self._parts.missing_blocks()]
        body = {
            "status": "missing blocks" if missing else "ok",
            "missing": missing,
            "running": self._parts.line.num_running,
            "waiting": self._parts.line.num_waiting,
        }
        await send_whole(send, json_bytes(body), status=503 if missing else 200)

    async def metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /metrics, for Prometheus."""
        await send_whole(send, self._parts.meter.text(), kind=metering.CONTENT_TYPE)

    async def page(self, scope: Scope, receive: Receive, send: Send) -> None:
        """GET /: the chat page."""
        await FileResponse(STATIC / "index.html")(scope, receive, send)

    def _model_object(self, adapter: str = "") -> dict[str, Any]:
        """The model, or the one that this adapter makes of it."""
        facts = self._parts.facts
        name = facts.names[0]
        return {
            "id": f"{name}:{adapter}" if adapter else name,
            **({"parent": name} if adapter else {}),
            "object": "model",
            "created": facts.created,
            "owned_by": "shoal",
            "max_model_len": facts.context_tokens,
            "shoal": {
                "names": list(facts.names),
                "num_blocks": facts.num_blocks,
                "can_chat": self._parts.encoder.can_chat,
            },
        }


class _Asgi:
    """An endpoint that sends its response itself. Routes take functions for another kind."""

    def __init__(self, endpoint: Callable[[Scope, Receive, Send], Any]) -> None:
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoint(scope, receive, send)


@asynccontextmanager
async def _told_in_stream(stream: EventStream, scope: Scope) -> AsyncIterator[None]:
    """Errors after the status has gone out become an event of the stream."""
    try:
        yield
    except CallerGone:
        raise
    except Exception as error:
        if not stream.is_open:
            raise
        told = as_api_error(error, f"request {scope['shoal.request_id']}")
        await stream.event(told.body())
        await stream.close()


def _wants_usage(body: Sampling) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _new_seed() -> int:
    return secrets.randbits(SEED_BITS)
