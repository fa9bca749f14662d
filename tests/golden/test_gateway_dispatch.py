"""A gateway with a dispatcher says the same, to many at once and turn after turn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

from shoal.gateway.opening import GatewayConfig
from tests.gateway_cases import Gate, gate

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 20}


def ask(running: Gate, client: openai.OpenAI, prompt: str) -> None:
    answer = client.completions.create(prompt=prompt, **GREEDY)
    assert answer.choices[0].text == running.alone(prompt, 20)


def test_many_at_once_and_turn_after_turn(tmp_path: Path) -> None:
    config = GatewayConfig(names=("tiny",), dispatch="chains")
    with gate(config, cache=tmp_path, replicas=2) as running, running.openai() as client:
        ask(running, client, "The sea")
        prompts = [f"Ship {number}" for number in range(6)]
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda prompt: ask(running, client, prompt), prompts))
        first = client.completions.create(prompt="The sea", **GREEDY).choices[0].text
        ask(running, client, "The sea" + first)
        two = client.completions.create(prompt="The sea", n=2, **GREEDY)
        assert {one.text for one in two.choices} == {first}
        assert running.metrics()["shoal_gateway_running"] == 0
