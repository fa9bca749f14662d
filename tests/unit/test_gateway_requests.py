"""Bodies: what is taken, what is refused and how."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shoal.gateway.bodies import ChatBody, CompletionBody, read_body
from shoal.gateway.errors import ApiError
from shoal.gateway.requests import (
    chat_settings,
    completion_settings,
    prompts,
    talk,
)

SAY = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> ChatBody:
    return read_body(json.dumps({"messages": SAY, **fields}).encode(), ChatBody)


def completion(**fields: Any) -> CompletionBody:
    return read_body(json.dumps({"prompt": "x", **fields}).encode(), CompletionBody)


@pytest.mark.parametrize(
    ("data", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b"[" * 100_000, None),
        (b"{}", None),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "pirate", "content": "x"}]}', "messages[0].role"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "messages[0].content"),
        (b'{"messages": [{"role": "user"}], "temperature": "hot"}', "temperature"),
        (b'{"messages": [{"role": "user"}], "temperature": -1}', "temperature"),
        (b'{"messages": [{"role": "user"}], "top_p": 1.5}', "top_p"),
        (b'{"messages": [{"role": "user"}], "n": 0}', "n"),
        (b'{"messages": [{"role": "user"}], "n": 1000}', "n"),
        (b'{"messages": [{"role": "user"}], "max_tokens": 0}', "max_tokens"),
        (b'{"messages": [{"role": "user"}], "stop": 5}', "stop"),
        (b'{"messages": [{"role": "user"}], "seed": 1e400}', "seed"),
        (b'{"messages": [{"role": "user"}], "presence_penalty": 3}', "presence_penalty"),
    ],
)
def test_what_is_no_chat_body(data: bytes, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        read_body(data, ChatBody)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert set(caught.value.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 1000]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"const": "x" * 200_000}},
                }
            },
            "response_format",
        ),
    ],
)
def test_options_that_can_not_be(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_settings(chat(**fields), lambda: 0)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_options_arrive() -> None:
    body = chat(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=7, n=2, stop="end",
        presence_penalty=1, frequency_penalty=0.5, repetition_penalty=1.1,
        logit_bias={"3": -100}, max_tokens=9, max_completion_tokens=5, logprobs=True,
    )  # fmt: skip
    settings = chat_settings(body, lambda: 0)
    sampler = settings.sampler(1)
    assert (sampler.temperature, sampler.top_p, sampler.top_k) == (0.5, 0.9, 5)
    assert (sampler.min_p, sampler.seed) == (0.1, 8)
    options = settings.options
    assert (options.presence, options.frequency, options.repetition) == (1.0, 0.5, 1.1)
    assert options.bias == {3: -100.0}
    assert (settings.stops, settings.max_tokens, settings.num_choices) == (("end",), 5, 2)
    assert settings.num_best == 0


def test_defaults_are_those_of_the_api() -> None:
    settings = chat_settings(chat(store=True, metadata={"a": "b"}, user="me"), lambda: 12)
    sampler = settings.sampler(0)
    assert (sampler.temperature, sampler.top_p, sampler.seed) == (1.0, None, 12)
    assert (settings.max_tokens, settings.num_best, settings.schema) == (None, None, None)
    assert completion_settings(completion(), lambda: 0).max_tokens == 16


def test_a_conversation_as_templates_take_it() -> None:
    found = talk(
        chat(
            messages=[
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "a"},
                                             {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function",
                     "function": {"name": "f", "arguments": '{"x": 1}'}}]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
            ],
            tools=[TOOL],
        )
    )  # fmt: skip
    system, user, assistant, tool = found.messages
    assert system == {"role": "system", "content": "Be brief."}
    assert user["content"] == "ab"
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert tool["tool_call_id"] == "1"
    assert found.tools[0]["function"]["name"] == "f"
    assert not found.is_call_forced
    assert talk(chat(tools=[TOOL], tool_choice="none")).tools == ()


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
    ],
)
def test_messages_that_can_not_be_read(message: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        talk(chat(messages=[message]))
    assert caught.value.status == 400
    assert "messages[0]" in str(caught.value.param)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt: Any, expected: list[Any]) -> None:
    assert prompts(completion(prompt=prompt)) == expected


@pytest.mark.parametrize("prompt", [[1, "a"], ["a", [1]], ["a"] * 1000])
def test_prompts_that_can_not_be(prompt: Any) -> None:
    with pytest.raises(ApiError, match="prompt"):
        prompts(completion(prompt=prompt))


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"best_of": 4}, {"echo": True, "logprobs": 1}])
def test_completions_that_can_not_be_done(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        completion_settings(completion(**fields), lambda: 0)
    assert caught.value.status == 400
