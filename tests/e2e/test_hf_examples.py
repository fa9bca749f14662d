"""Every example runs, over real servers and in its own process alike, and stays short."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoal.base.errors import ConfigError
from shoal.hf import AutoDistributedModelForCausalLM
from tests.e2e.processes import alone

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DOCUMENT = EXAMPLES.parent / "docs" / "library.md"
LINES_MAX = 80
SERVERS = ["0:3", "3:7"]
JOINING = {
    "generate": "sampled: ",
    "batch": "row 2: ",
    "beam": "",
    "hidden_states": "border   3: ",
    "own_sampling_loop": "the loaded session goes on the same",
    "async_conversations": "stepped: ",
}
"""What each prints, besides texts that nobody can read."""

TUNING = ("finetune_classify", "finetune_chat", "finetune_own_modules", "finetune_trainer")
"""Run by `test_finetune_examples.py`."""

Run = Callable[..., str]


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example in this process: importing torch seven times would take a minute."""

    def run(name: str, *arguments: str) -> str:
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr("sys.argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def join(serve, model) -> str:
    return serve(model, SERVERS)[0].address


def test_all_examples_are_run_and_short() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert {path.stem for path in paths} == {*JOINING, *TUNING, "private_swarm"}
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert max(lengths.values()) <= LINES_MAX, lengths


@pytest.mark.parametrize("name", JOINING)
def test_an_example_over_real_servers(name: str, run_example: Run, model, join: str) -> None:
    out = run_example(name, str(model), "--join", join)
    assert JOINING[name] in out


def test_an_example_over_servers_of_its_own(run_example: Run, model) -> None:
    out = run_example("generate", str(model), "--tokens", "16")
    assert "looked up: The sea is" + alone(model, "The sea is", 16)[1] in out


def test_a_private_swarm(run_example: Run, model) -> None:
    out = run_example(
        "private_swarm", str(model), "--blocks", "7", "--servers", "1", "--tokens", "16"
    )
    assert "without the invite: " in out
    assert "with it: The sea is" + alone(model, "The sea is", 16)[1] in out


def test_the_code_of_the_documentation_runs(
    model, join: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.M | re.S)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), str(DOCUMENT), "exec"), {"MODEL": model, "ADDRESS": join})


def test_the_library_over_real_servers(model, other_model, join: str) -> None:
    """The text of one machine, from an address; another model's is refused."""
    with AutoDistributedModelForCausalLM.from_pretrained(model, join=[join]) as opened:
        inputs = opened.tokenizer("Once", return_tensors="pt", return_token_type_ids=False)
        text = opened.generate(**inputs, max_new_tokens=16, do_sample=False)
        assert text[0, inputs["input_ids"].shape[1] :].tolist() == alone(model, "Once", 16)[0]
        assert opened.dtype == torch.float32
    with pytest.raises(ConfigError, match="the swarm serves model"):
        AutoDistributedModelForCausalLM.from_pretrained(other_model, join=join)
