"""Chat answers with calls in their text, whole and streamed."""

from __future__ import annotations

import asyncio
import json
from itertools import count
from typing import Any

import pytest

from shoal.gateway.answering import Piece
from shoal.gateway.chat import ChatForm, ChatStream, ChatWhole
from shoal.gateway.engine import Begun, Done
from shoal.gateway.http import EventStream
from shoal.gateway.objects import Envelope
from shoal.gateway.tools import find_way

TEXT = 'Let me see.\n<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'
DONE = Done(
    prompt_tokens=3, kept_tokens=1, answer_tokens=9, chain=(), recoveries=(), numerics="exact"
)


def form() -> ChatForm:
    numbers = count()
    return ChatForm(
        envelope=Envelope(id="c-1", kind="chat.completion", model="m", created=5),
        num_choices=1,
        way=find_way("<tool_call>"),
        is_call_forced=False,
        has_logprobs=False,
        text_of=str,
        new_id=lambda: f"call_{next(numbers)}",
    )


def pieces(text: str, ending: str = "stop", size: int = 5) -> list[Piece]:
    cut = [text[at : at + size] for at in range(0, len(text), size)]
    return [
        *(Piece(choice=0, text=part) for part in cut),
        Piece(choice=0, ending="stop" if ending == "stop" else "length"),
    ]


async def whole(taken: list[Piece]) -> dict[str, Any]:
    sink = ChatWhole(form())
    await sink.begun(Begun(chain=(), kept_tokens=0))
    for piece in taken:
        await sink.piece(piece)
    return sink.object(DONE)


async def streamed(taken: list[Piece], *, has_usage: bool) -> list[Any]:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    sink = ChatStream(form(), EventStream(send), has_usage=has_usage)
    await sink.begun(Begun(chain=(), kept_tokens=0))
    for piece in taken:
        await sink.piece(piece)
    await sink.end(DONE)
    lines = b"".join(sent).decode().removesuffix("data: [DONE]\n\n").split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_a_whole_answer_with_a_call() -> None:
    answer = asyncio.run(whole(pieces(TEXT)))
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"].rstrip() == "Let me see."
    (call,) = choice["message"]["tool_calls"]
    assert call["id"] == "call_0"
    assert call["function"] == {"name": "look", "arguments": '{"at": "sea"}'}
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_an_answer_that_is_nothing_but_a_call() -> None:
    answer = asyncio.run(whole(pieces(TEXT.partition("\n")[2])))
    assert answer["choices"][0]["message"]["content"] is None


def test_a_call_that_is_cut_says_so() -> None:
    (choice,) = asyncio.run(whole(pieces(TEXT[:40], "length")))["choices"]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]
    assert choice["message"]["content"].endswith('{"name": "look",')


@pytest.mark.parametrize("has_usage", [True, False])
def test_a_stream_with_a_call(has_usage: bool) -> None:
    chunks = asyncio.run(streamed(pieces(TEXT), has_usage=has_usage))
    deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(one["delta"].get("content", "") for one in deltas)
    assert text.rstrip() == "Let me see."
    calls = [call for one in deltas for call in one["delta"].get("tool_calls", [])]
    assert [(call["index"], call["function"]["name"]) for call in calls] == [(0, "look")]
    assert [one["finish_reason"] for one in deltas if one["finish_reason"]] == ["tool_calls"]
    assert deltas[-1]["delta"] == {}
    assert (chunks[-1].get("usage") or {}).get("total_tokens") == (12 if has_usage else None)
