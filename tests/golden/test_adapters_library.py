"""The library with LoRA adapters: the texts of transformers with PEFT, also when servers die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.base.errors import AdapterBad, BadInput, ConfigError
from shoal.hf import AutoDistributedModelForCausalLM
from shoal.hf.local_swarm import LocalSwarm
from tests.golden.adapter_cases import peft_model, read, save_adapter
from tests.golden.test_adapters import pytestmark as pytestmark
from tests.golden.test_chain_equals_model import prompt_of
from tests.models import save_safetensors, tiny_model

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model and two adapters of it, as transformers and PEFT save them."""
    root = tmp_path_factory.mktemp("adapters")
    save_safetensors(root / "model")
    for seed in (1, 2):
        save_adapter(root / str(seed), "llama", seed)
    return {"model": root / "model", "one": root / "1", "two": root / "2"}


@pytest.fixture(scope="module")
def expected(places: dict[str, Path]) -> dict[str, list[int]]:
    """Greedy tokens of one machine."""
    models = {"": tiny_model(), **{name: peft_model(places[name], "llama") for name in TWO}}
    return {name: greedy(model) for name, model in models.items()}


@pytest.fixture
def swarm(places: dict[str, Path]) -> Iterator[LocalSwarm]:
    with LocalSwarm(places["model"], borders=(0, 3, 7), replicas=2) as swarm:
        yield swarm


@pytest.fixture
def model(places: dict[str, Path], swarm: LocalSwarm) -> Iterator[Any]:
    with AutoDistributedModelForCausalLM.from_pretrained(places["model"], join=swarm) as model:
        yield model


TWO = ("one", "two")
PROMPT = torch.tensor([prompt_of(9)])


def greedy(model: Any, **options: Any) -> list[int]:
    found = model.generate(
        input_ids=PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        **options,
    )
    tokens: list[int] = found[0, PROMPT.shape[1] :].tolist()
    return tokens


def test_texts_are_those_of_peft(
    model: Any, places: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    assert greedy(model) == expected[""]
    model.load_adapter(places["one"], "one")
    model.load_adapter(places["two"], adapter_name="two")
    assert model.active_adapters() == ["two"]
    assert greedy(model) == expected["two"]
    for name in ("one", "", "two"):
        assert greedy(model, adapter=name) == expected[name]
    model.set_adapter("one")
    assert greedy(model) == expected["one"]
    model.disable_adapters()
    assert greedy(model) == expected[""]
    model.enable_adapters()
    assert greedy(model) == expected["one"]
    model.delete_adapter("one")
    assert greedy(model) == expected[""]
    with pytest.raises(ConfigError, match="no adapter is called 'one'"):
        model.set_adapter("one")


def test_a_death_changes_no_text(
    model: Any, swarm: LocalSwarm, places: dict[str, Path], expected: dict[str, list[int]]
) -> None:
    model.load_adapter(places["one"], "one")
    model.load_adapter(places["two"], "two")
    sessions = {name: model.session(adapter=name) for name in (*TWO, "")}
    found: dict[str, list[int]] = {name: [] for name in sessions}
    for step in range(NEW_TOKENS):
        if step in (3, 7):  # one server of each span
            swarm.crash(sessions[TWO[step == 7]].chain[step == 7].peer)
        for name, session in sessions.items():
            new = found[name][-1:] or PROMPT[0].tolist()
            scores = model.logits(session.step_ids(new, last=True))
            found[name].append(int(scores[-1].argmax()))
    assert found == {name: expected[name] for name in found}
    assert any(session.recoveries for session in sessions.values())
    for session in sessions.values():
        session.close()


def test_saved_sessions_keep_their_adapter(
    model: Any, places: dict[str, Path], expected: dict[str, list[int]], tmp_path: Path
) -> None:
    model.load_adapter(places["one"], "one")
    with model.session() as session:
        session.step_ids(PROMPT[0].tolist(), last=True)
        session.save(tmp_path / "s")
    model.disable_adapters()
    with model.load_session(tmp_path / "s") as session:
        assert session.past_key_values.adapter == model._adapters["one"]
        scores = model.logits(session.step_ids(expected["one"][:1], last=True))
        assert int(scores[-1].argmax()) == expected["one"][1]


def test_what_cannot_be(model: Any, places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter 'nobody'"):
        model.load_adapter("nobody")
    with pytest.raises(AdapterBad, match="adapter_config"):
        model.load_adapter(tmp_path)
    model.load_adapter(read(places["one"], "llama"))
    with pytest.raises(ConfigError, match="is taken"):
        model.load_adapter(places["two"])
    embeddings = torch.zeros(1, 4, 48, requires_grad=True)
    with pytest.raises(BadInput, match="disable_adapters"):
        model(inputs_embeds=embeddings)
    save_adapter(tmp_path / "wide", "wide", 1)
    model.load_adapter(read(tmp_path / "wide", "wide"), "wide")
    with pytest.raises(AdapterBad, match="made for another model"):
        greedy(model)
