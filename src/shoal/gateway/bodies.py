"""Request bodies of OpenAI's API as typed values, and JSON that is anything else refused.

What has no meaning here (store, metadata, user, ...) is taken and left alone, as all
compatible servers do. What would change the answer and can't be done is refused in
`requests.py`: an option that is ignored in silence is worse than an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from shoal.gateway.errors import ApiError

MESSAGES_MAX: Final = 4096
"""Of one conversation; a token each would fill most contexts."""

TOOLS_MAX: Final = 128
"""OpenAI's own limit."""

STOPS_MAX: Final = 16
"""OpenAI takes 4; people's programs send more."""

STOP_CHARS_MAX: Final = 256
"""So much text may be held back at most."""

CHOICES_MAX: Final = 8
"""Answers to one prompt: each is a session of its own."""

PROMPTS_MAX: Final = 32
"""Prompts of one completion request."""

TOP_LOGPROBS_MAX: Final = 20
"""OpenAI's own limit."""

BIASES_MAX: Final = 1024
"""Tokens with a bias; OpenAI's own limit."""

SEED_MAX: Final = 2**63 - 1

Probability = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
Tokens = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Stops = Annotated[list[str], msgspec.Meta(max_length=STOPS_MAX)]


class TextPart(msgspec.Struct, frozen=True):
    """A piece of a message. Pictures and sounds are refused where it is read."""

    type: str
    text: str = ""


class CalledFunction(msgspec.Struct, frozen=True):
    """A function that the model called; `arguments` is JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True):
    """A call of the model in an earlier turn."""

    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], msgspec.Meta(max_length=TOOLS_MAX)] | None = None
    tool_call_id: str | None = None


class Function(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may use."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(msgspec.Struct, frozen=True):
    """Of `ToolChoice`."""

    name: str


class ToolChoice(msgspec.Struct, frozen=True):
    """The one tool that must be called."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(msgspec.Struct, frozen=True):
    """Of `ResponseFormat`."""

    schema: dict[str, Any]
    name: str = ""


class ResponseFormat(msgspec.Struct, frozen=True):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream says besides the text."""

    include_usage: bool = False


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of requests have in common."""

    model: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] | None = None
    logit_bias: Annotated[dict[str, float], msgspec.Meta(max_length=BIASES_MAX)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-SEED_MAX, le=SEED_MAX)] | None = None
    stop: str | Stops | None = None
    max_tokens: Tokens | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False


class ChatBody(Sampling, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    tools: Annotated[list[Tool], msgspec.Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Sampling, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | int | list[int]], msgspec.Meta(min_length=1)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


Body = TypeVar("Body", bound=Sampling)


def read_body(data: bytes, kind: type[Body]) -> Body:
    """The body as a value.

    Raises:
        ApiError: 400: no JSON, a missing field, a wrong type or a value out of range.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        param = path.removesuffix("`").removeprefix("$").lstrip(".") or None
        raise ApiError(
            400, f"{param or 'body'}: {message}", code="invalid_value", param=param
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
