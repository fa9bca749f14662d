"""Stop strings and tool calls, however the text comes in pieces."""

from __future__ import annotations

import json

import pytest

from shoal.gateway.stops import StopScanner
from shoal.gateway.tools import CallReader, FoundCall, find_way, forced_schema, read_forced


def pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "is_stopped"),
    [
        ("one two three", [], "one two three", False),
        ("one two three", ["two"], "one ", True),
        ("one two three", ["four", "three", "two"], "one ", True),
        ("aaab", ["aab"], "a", True),
        ("ababac", ["abac"], "ab", True),
        ("one tw", ["two"], "one tw", False),
        ("###", ["\n", "####"], "###", False),
        ("stop", ["stop"], "", True),
    ],
)
def test_text_ends_before_the_first_stop(text, stops, expected, is_stopped, size) -> None:
    scanner = StopScanner(stops)
    shown = ""
    for piece in pieces(text, size):
        shown += scanner.push(piece)
        assert expected.startswith(shown), "shown text is never taken back"
    shown += scanner.finish()
    assert (shown, scanner.is_stopped) == (expected, is_stopped)


HERMES = "<tools></tools> return <tool_call>{...}</tool_call>"
TAGGED = "<tool_call><function=NAME><parameter=KEY>"
MISTRAL = "[AVAILABLE_TOOLS] [TOOL_CALLS]"
LLAMA = "Environment: ipython"


def call(name: str, **arguments: object) -> FoundCall:
    return FoundCall(name=name, arguments=json.dumps(arguments))


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (HERMES, "no call <b>", ["no call <b>"]),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
         [call("f", x=1)]),
        (HERMES, 'Well.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n'
         '<tool_call>{"name": "g", "arguments": {"a": "b"}}</tool_call>',
         ["Well.\n", call("f"), call("g", a="b")]),
        (HERMES, "<tool_call>{broken</tool_call> m", ["<tool_call>{broken</tool_call> m"]),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 2}}', [call("f", x=2)]),
        (HERMES, "<tool_call>cut", ["<tool_call>cut"]),
        (HERMES, '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
         ['<tool_call>{"name": 3, "arguments": {}}</tool_call>']),
        (HERMES, "a <tool", ["a <tool"]),
        (TAGGED, "<tool_call>\n<function=f>\n<parameter=x>\n3\n</parameter>\n<parameter=y>\ntwo\n"
         "lines\n</parameter>\n</function>\n</tool_call>", [call("f", x=3, y="two\nlines")]),
        (MISTRAL, '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]', [call("f", x=1)]),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g{}', [call("f", x=1), call("g")]),
        (LLAMA, '{"name": "f", "parameters": {"x": 1}}', [call("f", x=1)]),
        (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
         [call("f"), call("g")]),
        (LLAMA, "{just braces}", ["{just braces}"]),
        (LLAMA, "text {", ["text {"]),
    ],
)  # fmt: skip
def test_calls_are_found_in_text(template, text, expected, size) -> None:
    way = find_way(template)
    assert way is not None
    reader = CallReader(way)
    found = [part for piece in pieces(text, size) for part in reader.push(piece)]
    found += reader.finish()
    assert whole(found) == whole(expected)


def whole(parts: list[str | FoundCall]) -> list[str | FoundCall]:
    """Neighbouring texts together, without the white space at their ends."""
    merged: list[str | FoundCall] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return [part.rstrip() if isinstance(part, str) else part for part in merged]


def test_a_template_without_a_known_way() -> None:
    assert find_way("{% for m in messages %}{{ m.content }}{% endfor %}") is None


def test_a_forced_call_has_the_form_of_its_schema() -> None:
    schema = forced_schema([("f", {"type": "object"}), ("g", None)])
    assert [one["properties"]["name"]["const"] for one in schema["anyOf"]] == ["f", "g"]
    assert read_forced('{"name": "f", "arguments": {"x": 1}}') == [call("f", x=1)]
    with pytest.raises(ValueError):
        read_forced('{"name": "f", "argu')
