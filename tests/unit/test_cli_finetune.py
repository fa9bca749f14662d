"""`shoal finetune` on a whole tiny model in this process: results, going on, what is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from shoal.base.ids import peer_text
from shoal.base.spans import Span
from shoal.cli.app import run
from shoal.cli.finetune_curve import smoothed, text_curve, worsened
from shoal.cli.finetune_progress import Stopping, TrainingLine
from shoal.cli.finetune_spec import Asked, DataChoice, RunSpec
from shoal.cli.finetuning import begin
from shoal.cli.tuning_place import Place
from shoal.hf.tuning_build import LEARNING_RATES, Method
from shoal.hf.tuning_checkpoint import Evaluated, History, StepDone
from shoal.hf.tuning_settings import TuningSettings
from tests.models import tiny_model
from tests.tuning_cases import TEMPLATE, letters

ADDRESS = f"tcp://{peer_text(bytes(32))}@127.0.0.1:9"

TEXTS = [{"text": "the sea is " + "blue " * (number % 3 + 1)} for number in range(10)]
PAIRS = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(10)]
LABELS = [
    {"text": f"{number}: it rains", "label": "wet" if number % 2 else "dry"} for number in range(12)
]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Commands set variables for their own process, which is this one here.
    monkeypatch.setattr(os, "environ", dict(os.environ, SHOAL_CACHE=str(tmp_path / "cache")))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def finetune(*arguments: object) -> int:
    return run(["finetune", *map(str, arguments)])


@pytest.mark.parametrize(
    ("method", "rows"),
    [("lora", CHATS), ("prompt", PAIRS), ("deep-prompt", TEXTS), ("classifier", LABELS)],
)
def test_a_run_from_data_to_files(
    method: str, rows: list[dict[str, Any]], model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, out = write(tmp_path / "data.jsonl", rows), tmp_path / "out"
    code = finetune(
        model, "--local", "--data", data, "--method", method, "--out", out, "--steps", 4,
        "--eval-share", 0.25, "--eval-every", 2, "--prompt-tokens", 3, "--threads", 1, "--json",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    report = json.loads(said.out)
    assert report["steps"] == 4
    assert report["eval_loss"] > 0
    assert (report["eval_accuracy"] is None) == (method != "classifier")
    assert "step 4 of 4: loss " in said.err
    assert "evaluation after step 2: loss " in said.err
    assert "4 steps" in said.err  # the curve
    way = f"chat {model} --join ADDR --adapter {out}\n" if rows is CHATS else f"generate {model} "
    assert f"use it: shoal {way}" in said.err
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((out / "training.json").read_text())
    assert [one["step"] for one in record["history"]["steps"]] == [1, 2, 3, 4]
    assert [one["step"] for one in record["history"]["evaluations"]] == [0, 2, 4]
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


def test_a_stopped_run_goes_on_to_the_same_numbers(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", TEXTS)
    settings = TuningSettings(num_steps=6, save_every=3)
    method = Method(name="lora", dropout=0.1)
    choice = DataChoice(path=data, eval_path=None, eval_share=0.1, length_max=512, seed=0)

    def asked(name: str) -> Asked:
        return Asked(
            given=str(model), out=tmp_path / name, data=choice, method=method,
            settings=settings, epochs=None,
        )  # fmt: skip

    here = Place(swarm=None, patience_s=1.0)
    with begin(here, asked("whole")) as work:
        work.train()
    with begin(here, asked("cut")) as work:
        list(islice(work.run.advance(), 3))
        work.save()
    capsys.readouterr()
    assert finetune("--resume", tmp_path / "cut", "--local", "--threads", 1) == 0
    assert "going on after step 3" in capsys.readouterr().err
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    # Once more, when all is done: nothing changes.
    assert finetune("--resume", tmp_path / "cut", "--local", "--threads", 1) == 0
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "rows"),
    [("lora", TEXTS), ("prompt", TEXTS), ("deep-prompt", TEXTS), ("classifier", LABELS)],
)
def test_a_run_begins_at_what_another_one_learned(
    method: str, rows: list[dict[str, Any]], model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, first, second = write(tmp_path / "a.jsonl", rows), tmp_path / "1", tmp_path / "2"
    common = (model, "--local", "--threads", 1, "--data", data, "--steps", 2, "--eval-every", 2)
    sizes = {"lora": ("--rank", 3, "--targets", "o_proj")}.get(method, ("--prompt-tokens", 3))
    assert finetune(*common, "--out", first, "--method", method, *sizes) == 0
    ended = json.loads((first / "training.json").read_text())["history"]["evaluations"][-1]
    assert finetune(*common, "--out", second, "--from-adapter", first) == 0
    record = json.loads((second / "training.json").read_text())
    begun = record["history"]["evaluations"][0]
    assert (ended["step"], begun["step"]) == (2, 0)
    assert begun["loss"] == pytest.approx(ended["loss"], rel=1e-6)
    assert record["run"]["method"]["name"] == method
    assert record["run"]["settings"]["learning_rate"] == LEARNING_RATES[method]
    capsys.readouterr()
    assert finetune(*common, "--out", tmp_path / "3", "--from-adapter", first, "--rank", 4) == 2
    assert f"--rank: with --from-adapter that is as in {first}" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_run_begins_at_pefts_adapter(model: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=3, target_modules=["q_proj"], use_rslora=True,
        layers_to_transform=[1], init_lora_weights=False,
    )  # fmt: skip
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path / "theirs")
    data = write(tmp_path / "data.jsonl", TEXTS)
    choice = DataChoice(path=data, eval_path=None, eval_share=0.0, length_max=512, seed=0)
    asked = Asked(
        given=str(model), out=tmp_path / "out", data=choice, method=Method(name="lora"),
        settings=TuningSettings(num_steps=1), epochs=None, start=tmp_path / "theirs",
    )  # fmt: skip
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    with begin(Place(swarm=None, patience_s=1.0), asked) as work:
        lora = work.run.model.lora
        assert lora is not None
        assert lora.config.scale == pytest.approx(3 / 2**0.5)
        name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
        pairs = lora.pairs()
        assert torch.equal(pairs[1]["self_attn.q_proj"].b.detach(), theirs[name])
        assert not pairs[0]["self_attn.q_proj"].b.any()
        method = work.spec.method
        assert RunSpec.from_dict(work.spec.as_dict(), data).method == method


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_a_run_can_t_begin_at(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, first = write(tmp_path / "a.jsonl", LABELS), tmp_path / "1"
    common = (model, "--local", "--threads", 1, "--steps", 1)
    assert finetune(*common, "--data", data, "--out", first, "--method", "classifier") == 0
    write(data, [row | {"label": "fine"} for row in LABELS[:6]] + LABELS[6:])
    texts = write(tmp_path / "b.jsonl", TEXTS)
    cases = (
        (data, first, "tells dry, wet, the data has dry, fine, wet"),
        (texts, first, "has no labels"),
        (texts, tmp_path, "holds no adapter"),
    )
    for rows, start, message in cases:
        capsys.readouterr()
        words = ("--data", rows, "--out", tmp_path / "2", "--from-adapter", start)
        assert finetune(*common, *words) == 2
        assert message in capsys.readouterr().err
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["qkv_proj"])
    get_peft_model(tiny_model("phi3"), config).save_pretrained(tmp_path / "theirs")
    words = ("--data", texts, "--out", tmp_path / "2", "--from-adapter", tmp_path / "theirs")
    assert finetune(*common, *words) == 2
    said = capsys.readouterr().err
    assert "theirs is for another model: self_attn.qkv_proj of block 0 is not there" in said


def test_a_run_goes_on_from_a_step_before(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    words = ("--local", "--threads", 1)
    assert finetune(model, *words, "--data", data, "--out", out, "--steps", 1) == 0
    kept = out / "checkpoints" / "step-1.safetensors"
    kept.parent.mkdir()
    (out / "checkpoint.safetensors").rename(kept)
    assert finetune(*words, "--resume", out, "--from-step", 1) == 0
    assert "going on after step 1" in capsys.readouterr().err
    for more, message in (
        (("--resume", out, "--from-step", 2), "step-2.safetensors is not there; runs with"),
        (("--resume", out, "--from-step", 3), "keep some (here: 1)"),
        ((model, "--data", data, "--from-step", 1), "--from-step goes with --resume"),
    ):
        assert finetune(*words, *more) == 2
        assert message in capsys.readouterr().err


def test_a_loss_that_rose_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "a.jsonl", PAIRS)
    words = (model, "--local", "--threads", 1, "--data", data, "--steps", 4)
    assert finetune(*words, "--out", tmp_path / "1", "--learning-rate", 1e30) == 0
    assert "the loss ended higher than it began (" in (said := capsys.readouterr().err)
    assert "with a lower --learning-rate (it was 1e+30)" in said
    assert finetune(*words, "--out", tmp_path / "2") == 0
    assert "the loss ended higher" not in capsys.readouterr().err


def test_what_is_a_loss_that_rose() -> None:
    def history(losses: list[float], evaluations: list[float]) -> History:
        return History(
            steps=[
                StepDone(step=step, loss=loss, rate=0.1, gradient=1, num_tokens=5, duration_s=1)
                for step, loss in enumerate(losses, 1)
            ],
            evaluations=[
                Evaluated(step=step, loss=loss, accuracy=None)
                for step, loss in enumerate(evaluations)
            ],
        )

    assert worsened(history([4.0, 10.0], [])) == pytest.approx((4.0, 10.0))
    assert worsened(history([4.0, 10.0], [5.0])) is not None
    assert worsened(history([4.0, 10.0], [5.0, 4.0])) is None
    assert worsened(history([4.0, 3.0], [5.0, 6.0])) == (5.0, 6.0)
    for losses in ([], [4.0], [4.0, 4.2], [0.001, 0.01], [4.0, 9.0, *[2.0] * 200]):
        assert worsened(history(losses, [])) is None


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"--data": "absent.jsonl"}, "can't read"),
    ({"--method": "qlora"}, "--method qlora: one of lora, prompt, deep-prompt, classifier"),
    ({"--method": "classifier"}, "has no labels: a classifier needs"),
    ({"--targets": "gate"}, "called so; LoRA goes to mlp.down_proj"),
    ({"--rank": 0}, "rank 0"),
    ({"--dropout": 1.0}, "dropout 1.0"),
    ({"--prompt-tokens": 0, "--method": "prompt"}, "--prompt-tokens 0: at least 1"),
    ({"--max-length": 1}, "--max-length 1: from 2"),
    ({"--eval-share": 1.0}, "--eval-share 1: from 0"),
    ({"--epochs": 0}, "--epochs 0: more than 0"),
    ({"--learning-rate": 0}, "--learning-rate 0: nothing would be learned"),
    ({"--prompt-tokens": 1025, "--method": "deep-prompt"}, "servers take at most 1024"),
    ({"--seed": 2**53 + 1}, "--seed 9007199254740993: at most"),
    ({"--schedule": "step"}, "--schedule step: one of"),
    ({"--join": "tcp://x@127.0.0.1:1"}, "--local and --join or --lan: give one"),
    ({"--verify-rate": 0.5}, "--local asks no servers"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_refused(
    change: dict[str, object], message: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write(tmp_path / "data.jsonl", TEXTS)
    options = {"--data": data, "--out": tmp_path / "out", **change}
    words = [str(word) for pair in options.items() for word in pair]
    assert finetune(model, "--local", "--threads", 1, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


def test_what_is_missing_or_in_the_way(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert finetune(*arguments) == 2
        return capsys.readouterr().err

    data, out = write(tmp_path / "data.jsonl", TEXTS), tmp_path / "out"
    assert "no server named" in refused(model, "--data", data, "--out", out)
    assert "give MODEL, --data FILE and --out DIR" in refused(model, "--local", "--data", data)
    assert "can't read" in refused("--local", "--resume", tmp_path / "absent")
    assert finetune(model, "--local", "--data", data, "--out", out, "--steps", 1) == 0
    capsys.readouterr()
    assert "holds a run already" in refused(model, "--local", "--data", data, "--out", out)
    (out / "checkpoint.safetensors").rename(tmp_path / "checkpoint")
    assert "holds an adapter (adapter_config.json)" in refused(
        model, "--local", "--data", data, "--out", out
    )
    (tmp_path / "checkpoint").rename(out / "checkpoint.safetensors")
    assert "--steps: with --resume" in refused("--local", "--resume", out, "--steps", 2)
    write(data, TEXTS[1:])
    assert "has changed since the run" in refused("--local", "--resume", out)


def test_labels_belong_to_a_classifier(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", LABELS)
    assert finetune(model, "--local", "--data", data, "--out", tmp_path / "out") == 2
    assert "has labels: learn them with --method classifier" in capsys.readouterr().err


@pytest.mark.parametrize(("method", "most"), [("lora", 2048), ("prompt", 2032)])
def test_examples_that_no_server_runs_are_refused_at_once(
    method: str, most: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data.jsonl", [{"text": "a" * 5000}] * 3)
    code = finetune(
        model, "--join", ADDRESS, "--data", data, "--out", tmp_path / "out", "--method", method,
        "--max-length", most + 1,
    )  # fmt: skip
    assert code == 2
    assert f"--max-length {most}, or learn without" in capsys.readouterr().err


def test_the_first_interrupt_asks_and_the_second_ends(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Stopping().noticing() as stopping:
        assert not stopping.is_asked
        signal.raise_signal(signal.SIGINT)
        assert stopping.is_asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "finishing this step" in capfd.readouterr().err


class Interrupting(io.RawIOBase):
    """Whoever writes to it is interrupted in the middle, as by a Ctrl-C at the right moment."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return len(data)


def test_an_interrupt_may_strike_in_the_middle_of_a_print(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BufferedWriter(Interrupting()))
    with Stopping().noticing() as stopping:
        with monkeypatch.context() as context:
            context.setattr(sys, "stderr", stream)
            print("step 6 of 120", file=sys.stderr, flush=True)
        assert stopping.is_asked


def test_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """About twenty a run, with the time left by the last steps."""
    with TrainingLine(100, 0).shown() as line:
        for step in range(1, 101):
            line.stepped(
                StepDone(step=step, loss=1.0, rate=0.1, gradient=1.0, num_tokens=50, duration_s=2.0)
            )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[0] == "step 1 of 100: loss 1.0000, 25 tokens/s, 3:18 min left"
    assert lines[-1] == "step 100 of 100: loss 1.0000, 25 tokens/s, 0 s left"


def test_a_run_says_what_it_waits_for(capsys: pytest.CaptureFixture[str]) -> None:
    lost, busy = [Span(0, 2), Span(5, 6)], [Span(2, 5)]
    found = iter([[], busy, [], lost, lost, lost, [], []])
    seen_all = threading.Event()

    def missing() -> list[Span]:
        spans = next(found, None)
        if spans is None:
            seen_all.set()
        return spans or []

    line = TrainingLine(100, 0)
    with line.shown(), line.watching(missing, look_s=0.0):
        assert seen_all.wait(10.0)
    assert capsys.readouterr().err.splitlines() == [
        "waiting for servers of blocks [0,2), [5,6)",
        "all blocks have servers",
    ]


def test_the_curve_falls_where_the_loss_does() -> None:
    drawn = text_curve([3.0, 2.0, 1.0], width=4, height=2).splitlines()
    assert drawn[0].startswith("  3.0000 |")
    assert drawn[1].startswith("  1.0000 |")
    assert drawn[-1].split() == ["1", "3", "steps"]
    first, last = ord(drawn[0][10]) - 0x2800, ord(drawn[1][13]) - 0x2800
    assert first & 0x01  # the top left dot
    assert last & 0x80  # the bottom right one
    assert text_curve([]) == "(no steps yet)"
    assert text_curve([float(at) for at in range(1000)])
    assert smoothed([1.0] * 50) == pytest.approx([1.0] * 50)
