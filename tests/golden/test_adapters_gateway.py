"""Models `NAME:LABEL` of a gateway: answers that go through servers' own LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

from shoal.gateway.opening import GatewayConfig
from tests.gateway_cases import END, Gate, gate
from tests.golden.adapter_cases import peft_model, save_adapter
from tests.golden.test_adapters import pytestmark as pytestmark
from tests.golden.test_gateway_api import SEA, SEA_PROMPT

TOKENS = 15


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What one machine says, by label."""
    return {}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, texts: dict[str, str]) -> Iterator[Gate]:
    root = tmp_path_factory.mktemp("adapters")
    places = {"poet": root / "1", "cook": root / "2"}
    for seed, place in enumerate(places.values(), 1):
        save_adapter(place, "llama", seed)
    cache = tmp_path_factory.mktemp("cache")
    with gate(GatewayConfig(names=("tiny",)), cache=cache, adapters=places) as found:
        plain = found.reference
        texts[""] = found.alone(SEA_PROMPT, TOKENS)
        for label, place in places.items():
            found.reference = peft_model(place, "llama")
            texts[label] = adapted(found)
        found.reference = plain
        yield found


def adapted(found: Gate) -> str:
    ids = torch.tensor([found.ids(SEA_PROMPT)])
    whole = found.reference.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=END,
    )
    text: str = found.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_each_model_says_its_own(running: Gate, texts: dict[str, str]) -> None:
    def say(model: str) -> Any:
        return client.chat.completions.create(
            model=model, messages=SEA, max_tokens=TOKENS, temperature=0
        )

    with running.openai() as client:
        ids = [model.id for model in client.models.list().data]
        assert ids == ["tiny", "tiny:cook", "tiny:poet"]
        assert client.models.retrieve("tiny:poet").id == "tiny:poet"
        # Twice: the second time sessions are at rest, which must not be taken for another model.
        for label in ("", "poet", "cook", "poet", ""):
            model = f"tiny:{label}" if label else "tiny"
            answer = say(model)
            assert answer.choices[0].message.content == texts[label]
            assert answer.model == model
        for model in ("tiny:nobody", "other:poet", ":poet"):
            with pytest.raises(openai.NotFoundError):
                say(model)
        assert len(set(texts.values())) == 3
