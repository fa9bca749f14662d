"""`shoal finetune` over real servers: the curve of one machine, whoever is killed meanwhile."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.hf.tuning_files import read_learned
from shoal.hf.tuning_model import TunedModel
from shoal.hf.tuning_whole import load_whole
from shoal.model.source import open_source
from tests.e2e.nursery import Nursery
from tests.e2e.processes import Process, Server, error_line

pytestmark = pytest.mark.e2e

STEPS = 24
MANY_STEPS = 120
"""Some seconds: long enough for a signal to meet the run."""

TEXTS = [{"prompt": f"{at} and {at} is ", "completion": str(2 * at)} for at in range(1, 13)]
MOODS = [{"text": f"{at} sun", "label": "dry"} for at in range(6)] + [
    {"text": f"{at} rain", "label": "wet"} for at in range(6)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return path


def command(model: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [
        "finetune", str(model), "--data", str(data), "--out", str(out), "--steps", str(STEPS),
        "--batch-size", "3", "--eval-share", "0", "--threads", "1", "--learning-rate", "0.01",
        *extra,
    ]  # fmt: skip


def ended(nursery: Nursery, *arguments: str) -> Process:
    """A command that ran to its end, in a process that has imported everything."""
    process = Process(*arguments, launch=nursery.launch())
    process.wait(100)
    process.end()
    return process


def told(process: Process) -> dict[str, Any]:
    """The JSON that it printed last."""
    assert process.out, process.report()
    found: dict[str, Any] = json.loads(process.out[-1])
    return found


def generate(nursery: Nursery, model: Path, join: str, prompt: str, *extra: str) -> dict[str, Any]:
    """The JSON of a `shoal generate` that must succeed."""
    words = ("generate", str(model), "--join", join, "--prompt", prompt, "--threads", "1")
    return told(ended(nursery, *words, "--json", *extra))


def refused(nursery: Nursery, *arguments: str) -> str:
    """The error line of a command."""
    return error_line("".join(ended(nursery, *arguments).err))


def losses(out: Path) -> list[float]:
    history = json.loads((out / "training.json").read_text())["history"]
    return [float(one["loss"]) for one in history["steps"]]


def test_servers_and_the_client_are_killed_and_the_curve_stays(
    model: Path, data: Path, nursery: Nursery, serve: Any, tmp_path: Path
) -> None:
    """Servers are killed in mid-step, and the client; it goes on and ends as one machine."""
    ended(nursery, *command(model, data, tmp_path / "alone", "--local"))
    servers: list[Server] = serve(model, ["0:3", "3:7", "0:3", "3:7"])
    join = servers[1].address
    out = tmp_path / "out"
    options = ("--join", join, "--method", "lora", "--save-every", "4")
    client = Process(*command(model, data, out, *options), launch=nursery.launch())
    client.wait_line(client.err, "step 3 of")
    servers[0].signal(signal.SIGKILL)
    client.wait_line(client.err, "step 9 of")
    client.signal(signal.SIGKILL)
    client.wait()
    resume = ("finetune", "--resume", str(out), "--join", join, "--threads", "1")
    again = Process(*resume, launch=nursery.launch())
    again.wait_line(again.err, "going on after step ")
    again.wait_line(again.err, "step 12 of")
    servers[3].signal(signal.SIGKILL)
    again.wait(100)
    found = losses(out)
    assert len(found) == STEPS
    # What travels is rounded to bfloat16, which one machine's run does not do.
    assert found == pytest.approx(losses(tmp_path / "alone"), rel=5e-3)
    answer = generate(
        nursery, model, join, "3 and 3 is ", "--adapter", str(out), "--max-new-tokens", "4"
    )
    assert len(answer["token_ids"]) == 4
    for process in (client, again):
        process.end()


def test_interrupted_and_gone_on(
    model: Path, data: Path, nursery: Nursery, serve: Any, tmp_path: Path
) -> None:
    """Ctrl-C saves; the end is that of a run nobody interrupted, bit by bit; prompts generate."""
    join = serve(model, ["0:4", "4:7"])[0].address
    options = ("--join", join, "--method", "prompt", "--prompt-tokens", "4")
    options = (*options, "--steps", str(MANY_STEPS))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ended(nursery, *command(model, data, whole, *options))
    client = Process(*command(model, data, cut, *options), launch=nursery.launch())
    client.wait_line(client.err, "step 6 of")
    client.signal(signal.SIGINT)
    client.wait(60)
    client.wait_line(client.err, "go on with: shoal finetune --resume")
    assert "interrupted\n" in client.err
    assert not (cut / "training.json").exists()
    client.end()
    resume = ("finetune", "--resume", str(cut), "--join", join, "--threads", "1", "--json")
    assert told(ended(nursery, *resume))["steps"] == MANY_STEPS
    assert losses(cut) == losses(whole)
    prompt, behind = "2 and 2 is ", ("--adapter", str(cut), "--max-new-tokens")
    answer = generate(nursery, model, join, prompt, *behind, "6")
    assert answer["token_ids"] == whole_greedy(model, cut, prompt, 6)
    # An answer behind a prompt is saved and resumed as any other.
    saved = str(tmp_path / "answer")
    half = generate(nursery, model, join, prompt, *behind, "3", "--save", saved)
    rest = told(
        ended(nursery, "generate", "--resume", saved, "--join", join, "--json", *behind, "6")
    )
    assert rest["token_ids"] == answer["token_ids"]
    assert half["token_ids"] == answer["token_ids"][:3]
    again = ("generate", "--resume", saved, "--join", join, "--max-new-tokens", "9")
    assert "adapter" in refused(nursery, *again)


def test_deep_prompts_and_classes_generate(
    model: Path, data: Path, nursery: Nursery, serve: Any, tmp_path: Path
) -> None:
    join = serve(model, ["0:4", "4:7"])[0].address
    deep, moods = tmp_path / "deep", tmp_path / "moods"
    options = ("--join", join, "--method", "deep-prompt", "--prompt-tokens", "3")
    ended(nursery, *command(model, data, deep, *options))
    answer = generate(
        nursery, model, join, "4 and 4 is ", "--adapter", str(deep), "--max-new-tokens", "5"
    )
    assert answer["token_ids"] == whole_greedy(model, deep, "4 and 4 is ", 5)
    data.write_text("".join(json.dumps(row) + "\n" for row in MOODS))
    options = ("--join", join, "--method", "classifier", "--prompt-tokens", "2")
    ended(nursery, *command(model, data, moods, *options))
    found = generate(nursery, model, join, "9 rain", "--adapter", str(moods))
    assert found["label"] == "wet"
    assert sum(found["shares"].values()) == pytest.approx(1.0)
    words = ("generate", str(model), "--join", join, "--prompt", "9 rain", "--adapter", str(moods))
    line = refused(nursery, *words, "--save", str(tmp_path / "answer"))
    assert "--save: not with deep prompts or classes" in line


@torch.no_grad()
def whole_greedy(model: Path, folder: Path, prompt: str, count: int) -> list[int]:
    """What one machine says behind what was learned."""
    source = open_source(model, folder)
    prompt_module, classes = read_learned(folder).modules()
    tuned = TunedModel(load_whole(source, "alone"), prompt=prompt_module, classes=classes).eval()
    ids = [int(token) for token in source.tokenizer()(prompt)["input_ids"]]
    start = len(ids)
    for _ in range(count):
        ids.append(int(tuned.logits(torch.tensor([ids]), (len(ids),))[0, -1].argmax()))
    return ids[start:]
