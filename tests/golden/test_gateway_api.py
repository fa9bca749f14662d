"""The official client against a gateway: the words are those of the whole model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from shoal.gateway import engine
from shoal.gateway.opening import GatewayConfig
from shoal.hf import local_swarm
from tests.gateway_cases import Gate, gate

SEA = [{"role": "user", "content": "The sea"}]
SEA_PROMPT = "[user]The sea[assistant]"
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    config = GatewayConfig(names=("tiny", "alias"))
    with gate(config, cache=tmp_path_factory.mktemp("cache"), replicas=2) as found:
        yield found


@pytest.fixture(scope="module")
def client(running: Gate) -> Iterator[openai.OpenAI]:
    with running.openai() as found:
        yield found


def streamed(chunks: Any) -> tuple[str, list[Any]]:
    kept = list(chunks)
    return "".join(one.choices[0].delta.content or "" for one in kept if one.choices), kept


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("alias").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_chat_says_what_transformers_says(running: Gate, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=SEA, max_tokens=30, **GREEDY)
    choice = answer.choices[0]
    assert choice.message.content == running.alone(SEA_PROMPT, 30)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (24, 30)
    assert answer.usage.total_tokens == 54
    assert answer.object == "chat.completion"


def test_a_stream_says_the_same(running: Gate, client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(
        messages=SEA, max_tokens=30, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    text, kept = streamed(chunks)
    assert text == running.alone(SEA_PROMPT, 30)
    assert len(kept) > 20, "it comes piece by piece"
    assert kept[0].choices[0].delta.role == "assistant"
    assert kept[-2].choices[0].finish_reason == "length"
    assert kept[-1].usage.completion_tokens == 30
    assert len(kept[-1].shoal["chain"]) == 3
    assert len({one.id for one in kept}) == 1


def test_completions_of_several_prompts(running: Gate, client: openai.OpenAI) -> None:
    prompts = ["The sea", "A hill", "x"]
    answer = client.completions.create(prompt=prompts, max_tokens=12, echo=True, **GREEDY)
    found = [choice.text for choice in answer.choices]
    assert found == [prompt + running.alone(prompt, 12) for prompt in prompts]
    by_ids = client.completions.create(prompt=running.ids("A hill"), max_tokens=12, **GREEDY)
    assert by_ids.choices[0].text == running.alone("A hill", 12)
    pieces = ["", "", ""]
    for chunk in client.completions.create(prompt=prompts, max_tokens=12, stream=True, **GREEDY):
        pieces[chunk.choices[0].index] += chunk.choices[0].text
    assert pieces == [running.alone(prompt, 12) for prompt in prompts]


def test_stop_strings_end_a_text(running: Gate, client: openai.OpenAI) -> None:
    whole = running.alone(SEA_PROMPT, 30)
    stop = whole[10:12]
    expected = whole[: whole.index(stop)]
    answer = client.chat.completions.create(messages=SEA, max_tokens=30, stop=[stop], **GREEDY)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(
        messages=SEA, max_tokens=30, stop=stop, stream=True, **GREEDY
    )
    assert streamed(chunks)[0] == expected


def test_a_seed_repeats_a_text(client: openai.OpenAI) -> None:
    def say(seed: int | None) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=SEA, max_tokens=16, temperature=1.5, seed=seed, top_p=0.95,
            extra_body={"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1},
        )  # fmt: skip
        return str(answer.choices[0].message.content)

    assert say(5) == say(5)
    assert len({say(5), say(6), say(None), say(None)}) > 1


def test_choices_are_forks_of_one_prompt(running: Gate, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(messages=SEA, max_tokens=10, n=3, **GREEDY)
    alone = running.alone(SEA_PROMPT, 10)
    assert [choice.message.content for choice in answer.choices] == [alone] * 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    hot = client.chat.completions.create(
        model="tiny", messages=SEA, max_tokens=10, n=3, temperature=2, seed=1
    )
    assert len({choice.message.content for choice in hot.choices}) > 1
    one = client.chat.completions.create(
        model="tiny", messages=SEA, max_tokens=10, temperature=2, seed=2
    )
    assert one.choices[0].message.content == hot.choices[1].message.content


def test_logprobs_are_the_models_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        messages=SEA, max_tokens=5, logprobs=True, top_logprobs=3, **GREEDY
    )
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert "".join(one.token for one in content) == answer.choices[0].message.content
    for one in content:
        assert one.logprob == one.top_logprobs[0].logprob < 0
        assert len(one.top_logprobs) == 3
    old = client.completions.create(prompt=SEA_PROMPT, max_tokens=5, logprobs=2, **GREEDY)
    logprobs = old.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == pytest.approx([one.logprob for one in content], abs=1e-4)


def test_penalties_and_biases_change_a_text(running: Gate, client: openai.OpenAI) -> None:
    plain = running.alone(SEA_PROMPT, 12)
    changed = client.chat.completions.create(
        messages=SEA, max_tokens=12, frequency_penalty=2, presence_penalty=2, **GREEDY
    )
    assert changed.choices[0].message.content != plain
    (token,) = running.ids("Q")
    forced = client.chat.completions.create(
        messages=SEA, max_tokens=4, logit_bias={str(token): 100}, **GREEDY
    )
    assert forced.choices[0].message.content == "QQQQ"


def test_a_schema_is_followed(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
                       "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=SEA, max_tokens=200, temperature=1, seed=seed,
            response_format=form,
        )  # fmt: skip
        value = json.loads(str(answer.choices[0].message.content))
        assert set(value) == {"a", "b"}
        assert 0 <= value["a"] <= 99
        assert answer.choices[0].finish_reason == "stop"


TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {"at": {"enum": ["sea", "sky"]}},
                "required": ["at"],
                "additionalProperties": False,
            },
        },
    }
]


def test_a_tool_call_can_be_forced(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": SEA, "max_tokens": 200, "seed": 3, "tools": TOOLS,
        "tool_choice": "required",
    }  # fmt: skip
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.function.name == "look"
    assert json.loads(call.function.arguments)["at"] in ("sea", "sky")
    assert choice.message.content is None
    calls = [
        one
        for chunk in client.chat.completions.create(stream=True, **asked)
        for one in chunk.choices[0].delta.tool_calls or []
    ]
    assert [(one.index, one.function.arguments) for one in calls] == [(0, call.function.arguments)]
    answered = [
        *SEA, choice.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "1"}
    ]  # fmt: skip
    after = client.chat.completions.create(messages=answered, tools=TOOLS, max_tokens=3, **GREEDY)
    assert after.choices[0].message.content


def test_a_next_turn_sends_only_what_is_new(running: Gate, client: openai.OpenAI) -> None:
    talk: list[Any] = [{"role": "user", "content": "Where does the river end?"}]
    first = client.chat.completions.create(messages=talk, max_tokens=20, **GREEDY)
    said = str(first.choices[0].message.content)
    talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "And why?"}]
    second = client.chat.completions.create(messages=talk, max_tokens=20, **GREEDY)
    assert first.usage is not None
    assert second.usage is not None
    kept = second.usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
    held = first.usage.prompt_tokens + first.usage.completion_tokens
    assert held - 2 <= int(kept or 0) <= held
    prompt = f"[user]Where does the river end?[assistant]{said}[user]And why?[assistant]"
    assert second.choices[0].message.content == running.alone(prompt, 20)


def test_many_at_once(running: Gate) -> None:
    before = running.metrics()
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        with running.openai() as mine:
            answer = mine.chat.completions.create(
                messages=[{"role": "user", "content": f"Number {number}"}], max_tokens=12, **GREEDY
            )
            texts[number] = str(answer.choices[0].message.content)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {
        number: running.alone(f"[user]Number {number}[assistant]", 12) for number in range(10)
    }
    after = running.metrics()
    rows, calls = (
        after[name] - before[name]
        for name in ("shoal_gateway_head_rows", "shoal_gateway_head_calls")
    )
    assert rows == 120
    assert calls < rows, "rows that came together share a call"


def test_who_leaves_frees_the_session_at_once(running: Gate, client: openai.OpenAI) -> None:
    before = running.on_loop(lambda: running.client.num_sessions)
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": "Gone soon"}], stream=True, max_tokens=400, **GREEDY
    )
    next(iter(stream))
    assert running.on_loop(lambda: running.client.num_sessions) == before + 1
    stream.close()
    running.wait_until(lambda: running.client.num_sessions == before)


def test_a_crash_is_a_pause(running: Gate, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is a crash?"}]
    stream = client.chat.completions.create(
        messages=messages, stream=True, max_tokens=60, stream_options={"include_usage": True},
        **GREEDY,
    )  # fmt: skip
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        if len(chunks) == 8:
            middle = chunks[0].shoal["chain"][1]["peer"]
            running.swarm.crash(next(p for p in running.swarm.peers if _text(p) == middle))
    text, _ = streamed(chunks)
    assert text == running.alone("[user]What is a crash?[assistant]", 60)
    (recovery,) = chunks[-1].shoal["recoveries"]
    assert recovery["lost"] == [middle]
    told = [one.shoal["recoveries"] for one in chunks[:-1] if "recoveries" in (_facts(one))]
    assert told == [[recovery]], "the page hears of it when it happens"
    assert running.metrics()["shoal_gateway_repairs_total"] >= 1


def test_sessions_at_rest_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_swarm, "CACHE_TOKENS", 256)
    monkeypatch.setattr(engine, "STALL_S", 0.3)
    monkeypatch.setattr(engine, "STALL_S_PER_TOKEN", 0.0)
    config = GatewayConfig(names=("tiny",), kept_tokens=512)
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    with gate(config, cache=tmp_path, borders=(0, 7)) as small:
        client = small.openai()
        for prompt in ("One", "Two"):
            # A client may have three quarters of the cache: two of these don't fit.
            answer = client.completions.create(prompt=prompt, **asked)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 150
        assert small.metrics()["shoal_gateway_kept_sessions"] == 1


def _facts(chunk: Any) -> dict[str, Any]:
    return getattr(chunk, "shoal", None) or {}


def _text(peer: Any) -> str:
    from shoal.base.ids import peer_text

    return peer_text(peer)
