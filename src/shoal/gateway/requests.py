"""From a body to what is to be computed. Pure; refuses what can't be done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shoal.base.errors import ConfigError
from shoal.gateway.bodies import (
    PROMPTS_MAX,
    STOP_CHARS_MAX,
    STOPS_MAX,
    ChatBody,
    CompletionBody,
    Message,
    Sampling,
    Tool,
    ToolChoice,
)
from shoal.gateway.errors import ApiError
from shoal.gateway.tools import forced_schema
from shoal.hf.sampling import Sampler
from shoal.hf.score_rules import ScoreOptions

TEMPERATURE: Final = 1.0
"""OpenAI's default."""

TOP_P_MIN: Final = 1e-6
"""What 0 becomes: the best token alone, as people who send 0 mean it."""

SCHEMA_CHARS_MAX: Final = 1 << 17
"""A schema that is longer takes seconds to prepare."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How answers are to be made."""

    sampler: Callable[[int], Sampler]
    """The sampler of each choice, by its index."""
    options: ScoreOptions = field(default_factory=ScoreOptions)
    stops: tuple[str, ...] = ()
    max_tokens: int | None = None
    """None: as many as the context holds."""
    num_choices: int = 1
    num_best: int | None = None
    """How many of the likeliest tokens to tell, with log-probabilities; None: nothing."""
    schema: str | None = None
    """A JSON schema that the answer must have."""
    ignores_end: bool = False
    """Whether end tokens are tokens like others: for measurements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Talk:
    """A conversation as a chat template takes it."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)
    """What else the template is told."""
    is_call_forced: bool = False
    """Whether the answer is a call, by the grammar."""


def chat_settings(body: ChatBody, new_seed: Callable[[], int]) -> Settings:
    """What a chat request asks for.

    Raises:
        ApiError: 400: options that can't be, or contradict each other.
    """
    schema = _format_schema(body)
    forced = _forced_tools(body)
    if forced:
        if schema is not None:
            raise ApiError(
                400, "response_format and a forced tool_choice: give one", param="tool_choice"
            )
        calls = [(tool.function.name, tool.function.parameters) for tool in forced]
        schema = _schema_text(forced_schema(calls), "tools")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return _settings(
        body,
        new_seed,
        schema=schema,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        num_best=(body.top_logprobs or 0) if body.logprobs else None,
    )


def talk(body: ChatBody) -> Talk:
    """The conversation of a chat request.

    Raises:
        ApiError: 400: content of another kind than text, or a tool_choice without its tool.
    """
    tools = () if body.tool_choice == "none" else tuple(body.tools or ())
    return Talk(
        messages=tuple(_message(one, at) for at, one in enumerate(body.messages)),
        tools=tuple(_tool(tool) for tool in tools),
        extras=dict(body.chat_template_kwargs or {}),
        is_call_forced=bool(_forced_tools(body)),
    )


def completion_settings(body: CompletionBody, new_seed: Callable[[], int]) -> Settings:
    """What a completion request asks for.

    Raises:
        ApiError: 400: options that can't be done.
    """
    if body.suffix:
        raise ApiError(400, "suffix: models here only go on, they fill nothing in", param="suffix")
    if body.best_of not in (None, 1, body.n):
        raise ApiError(400, "best_of can't be done; ask for n answers", param="best_of")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo gives the text only, without logprobs", param="echo")
    return _settings(
        body,
        new_seed,
        schema=_format_schema(body),
        max_tokens=body.max_tokens or 16,  # OpenAI's default
        num_best=body.logprobs,
    )


def prompts(body: CompletionBody) -> list[str | list[int]]:
    """The prompts of a completion request: texts, or lists of tokens.

    Raises:
        ApiError: 400: a mixture, none, or too many.
    """
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(one, int) for one in prompt):
        return [[one for one in prompt if isinstance(one, int)]]
    if len(prompt) > PROMPTS_MAX:
        raise ApiError(400, f"at most {PROMPTS_MAX} prompts at once", param="prompt")
    found: list[str | list[int]] = [one for one in prompt if not isinstance(one, int)]
    if len(found) != len(prompt) or len({isinstance(one, str) for one in found}) != 1:
        raise ApiError(400, "prompt: texts, or lists of tokens, not both", param="prompt")
    return found


def _settings(
    body: Sampling,
    new_seed: Callable[[], int],
    *,
    schema: str | None,
    max_tokens: int | None,
    num_best: int | None,
) -> Settings:
    seed = new_seed() if body.seed is None else body.seed
    temperature = TEMPERATURE if body.temperature is None else body.temperature

    def sampler(choice: int) -> Sampler:
        return Sampler(
            temperature=temperature,
            seed=seed + choice,
            top_k=body.top_k if body.top_k and body.top_k > 0 else None,
            top_p=None if body.top_p is None else max(body.top_p, TOP_P_MIN),
            min_p=body.min_p,
        )

    try:
        sampler(0)
    except ConfigError as error:
        raise ApiError(400, error.detail, code="invalid_value") from error
    return Settings(
        sampler=sampler,
        options=ScoreOptions(
            repetition=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence=body.presence_penalty or 0.0,
            frequency=body.frequency_penalty or 0.0,
            bias=_biases(body.logit_bias or {}),
        ),
        stops=_stops(body.stop),
        max_tokens=max_tokens,
        num_choices=body.n or 1,
        num_best=num_best,
        schema=schema,
        ignores_end=body.ignore_eos,
    )


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > STOPS_MAX or any(not 0 < len(one) <= STOP_CHARS_MAX for one in stops):
        raise ApiError(
            400, f"stop: texts of 1 to {STOP_CHARS_MAX} characters", code="invalid_value",
            param="stop",
        )  # fmt: skip
    return stops


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        biases = {int(token): value for token, value in given.items()}
    except ValueError as error:
        raise ApiError(400, "logit_bias: keys are token ids", param="logit_bias") from error
    if any(not -100.0 <= value <= 100.0 for value in biases.values()):
        raise ApiError(400, "logit_bias: values are from -100 to 100", param="logit_bias")
    return biases


def _format_schema(body: Sampling) -> str | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return '{"type": "object"}'
    if wanted.json_schema is None:
        raise ApiError(
            400, "response_format: json_schema needs json_schema.schema", param="response_format"
        )
    return _schema_text(wanted.json_schema.schema, "response_format")


def _schema_text(schema: dict[str, Any], param: str) -> str:
    text = json.dumps(schema)
    if len(text) > SCHEMA_CHARS_MAX:
        raise ApiError(
            400, f"{param}: a schema of more than {SCHEMA_CHARS_MAX} characters", param=param
        )
    return text


def _forced_tools(body: ChatBody) -> list[Tool]:
    """The tools of which one must be called; empty: none must."""
    tools = list(body.tools or ())
    choice = body.tool_choice
    if isinstance(choice, ToolChoice):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    elif choice != "required":
        return []
    if not tools:
        raise ApiError(400, "tool_choice names a tool that tools lacks", param="tool_choice")
    return tools


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {
        "name": tool.function.name,
        "description": tool.function.description or "",
        "parameters": tool.function.parameters or {"type": "object", "properties": {}},
    }
    return {"type": "function", "function": function}


def _message(message: Message, at: int) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        strange = next((part.type for part in content if part.type != "text"), None)
        if strange is not None:
            raise ApiError(
                400, f"content of type {strange!r}: this model reads text only",
                param=f"messages[{at}].content",
            )  # fmt: skip
        content = "".join(part.text for part in content)
    found: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.function.name, "arguments": _arguments(call, at)},
            }
            for call in message.tool_calls
        ]
    return found


def _arguments(call: Any, at: int) -> dict[str, Any]:
    """Templates write objects as JSON themselves; OpenAI has the JSON's text."""
    try:
        value = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, "arguments of a tool call are a JSON object as text",
            param=f"messages[{at}].tool_calls",
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise ApiError(
            400, "arguments of a tool call are a JSON object", param=f"messages[{at}].tool_calls"
        )
    return value
