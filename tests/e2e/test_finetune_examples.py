"""The examples of fine-tuning learn what they say, small ones over servers of this process."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.hf import LocalSwarm
from tests.models import tiny_model
from tests.tuning_cases import TEMPLATE, letters

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
REAL = "smollm2-135m-instruct"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(name: str, *arguments: str) -> str:
        path = str(EXAMPLES / f"finetune_{name}.py")
        monkeypatch.setattr("sys.argv", [path, *arguments])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


def losses(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", out)]


def test_classes(run_example: Run, model: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [("sun " * (at % 3 + 1), "dry") for at in range(8)]
    rows += [("rain " * (at % 3 + 1), "wet") for at in range(8)]
    data.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows[::-1]))
    out = run_example(
        "classify", model, "--data", str(data), "--kept-back", "2", "--rate", "0.03",
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert "told right: 2 of 2" in out
    assert losses(out)[-1] < losses(out)[0]
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_chats(run_example: Run, model: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me, of course"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    out = run_example("chat", model, "--data", str(data), "--steps", "6")
    assert losses(out)[-1] < losses(out)[0]
    assert out.index("before: ") < out.index("after: ")


def test_own_modules(run_example: Run, model: str) -> None:
    out = run_example("own_modules", model, "--text", "one two", "--steps", "10")
    assert losses(out)[-1] < losses(out)[0] - 0.1
    assert "tokens known by heart: " in out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer(run_example: Run, model: str) -> None:
    out = run_example("trainer", model, "--steps", "8")
    found = [float(loss) for loss in out.rpartition("losses: ")[2].split()]
    assert len(found) == 2
    assert found[1] < found[0]


def test_the_code_of_the_documentation_runs(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES.parent / "docs" / "finetuning.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 2
    with LocalSwarm(model) as swarm:
        exec(
            compile("\n".join(blocks), "finetuning.md", "exec"), {"MODEL": model, "ADDRESS": swarm}
        )
    assert (tmp_path / "classes" / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.real_model
def test_classes_with_the_real_model(run_example: Run) -> None:
    out = run_example("classify", REAL, "--steps", "6", "--batch", "4", "--kept-back", "8")
    assert losses(out)[-1] < losses(out)[0]
    right = re.search(r"told right: (\d+) of 8", out)
    assert right is not None
