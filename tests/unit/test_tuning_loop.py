"""A training run: it learns, it goes on as if it had never stopped, it is told what is wrong."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from shoal.base.errors import BadInput, BadOutput, ConfigError
from shoal.hf.tuning_build import Method, build
from shoal.hf.tuning_checkpoint import Evaluated, StepDone, read_checkpoint
from shoal.hf.tuning_loop import TuningRun
from shoal.hf.tuning_loss import PIECE_ROWS, next_token_loss
from shoal.hf.tuning_model import TunedModel
from shoal.hf.tuning_settings import TuningSettings, steps_of
from tests.tuning_cases import METHODS, shaken, tiny_examples, tiny_model_of, whole_base

SPEC = {"what": "a test"}


def run_of(method: str = "prompt", **settings: object) -> TuningRun:
    chosen = {"num_steps": 6, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2}
    return TuningRun(
        tiny_model_of(method),
        TuningSettings(**{**chosen, **settings}),  # type: ignore[arg-type]
        tiny_examples(),
        tiny_examples(4, seed=9),
        clock=lambda: 0.0,
    )


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(method: str) -> None:
    run = run_of(method, num_steps=12, batch_size=12, eval_every=6)
    events = list(run.advance())
    assert [type(event) for event in events].count(Evaluated) == 3
    before, *_, after = run.history.evaluations
    assert (before.step, after.step) == (0, 12)
    steps = run.history.steps
    assert [one.step for one in steps] == list(range(1, 13))
    assert steps[-1].loss < steps[0].loss
    is_classes = method in ("classifier", "head")
    assert (after.accuracy is not None) == is_classes
    assert all(one.grad is None for one in run.model.parameters())


@pytest.mark.parametrize("method", ["deep-prompt", "lora", "classifier"])
def test_it_goes_on_as_if_it_had_never_stopped(method: str, tmp_path: Path) -> None:
    """Bit by bit, dropout and the optimiser's state included."""
    whole = run_of(method, accumulate=2)
    list(whole.advance())
    broken = run_of(method, accumulate=2)
    list(islice(broken.advance(), 3))
    path = tmp_path / "checkpoint"
    broken.save(path, SPEC)
    resumed = run_of(method, accumulate=2)
    shaken(resumed.model)
    resumed.go_on_from(read_checkpoint(path))
    list(resumed.advance())
    assert resumed.history == whole.history
    for (name, mine), other in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(mine, other), name


def test_a_finished_run_has_its_evaluation(tmp_path: Path) -> None:
    """Stopped between the last step and the evaluation behind it."""
    run = run_of()
    list(islice(run.advance(), 6))
    assert not run.history.evaluations
    run.save(tmp_path / "checkpoint", SPEC)
    again = run_of()
    again.go_on_from(read_checkpoint(tmp_path / "checkpoint"))
    (found,) = again.advance()
    assert isinstance(found, Evaluated)
    assert not list(again.advance())


def test_accumulated_passes_are_one_batch() -> None:
    """The mean is over the predictions of the whole step, whatever the passes' lengths."""
    one, two = run_of(batch_size=6), run_of(batch_size=2, accumulate=3)
    firsts = [next(run.advance()) for run in (one, two)]
    assert all(isinstance(first, StepDone) for first in firsts)
    assert firsts[0].loss == pytest.approx(firsts[1].loss, rel=1e-5)
    for mine, other in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_run_that_diverges_stops_before_it_spoils_anything() -> None:
    run = run_of()
    with torch.no_grad():
        run.model.prompt.prompt[0, 0] = float("inf")
    before = [value.clone() for value in run.model.parameters()]
    with pytest.raises(BadOutput, match="lower --learning-rate"):
        list(run.advance())
    assert not run.history.steps
    for value, old in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:100], "is no checkpoint of ours"),
        (lambda data: b"\xff" * 64, "is no checkpoint of ours"),
        (lambda data: b"", "is no checkpoint of ours"),
        (lambda data: data.replace(b"shoal-tuning-1", b"shoal-tuning-9"), "has the format"),
    ],
)
def test_files_that_are_no_checkpoint(change, message: str, tmp_path: Path) -> None:
    run = run_of()
    path = tmp_path / "checkpoint"
    run.save(path, SPEC)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=message):
        read_checkpoint(path)
    with pytest.raises(ConfigError, match="can't read"):
        read_checkpoint(tmp_path / "absent")


def test_checkpoints_of_something_else(tmp_path: Path) -> None:
    run = run_of("prompt")
    list(islice(run.advance(), 2))
    run.save(tmp_path / "checkpoint", SPEC)
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    assert dict(checkpoint.run) == SPEC
    with pytest.raises(ConfigError, match="does not fit"):
        run_of("deep-prompt").go_on_from(checkpoint)
    with pytest.raises(ConfigError, match="2 of 1 steps"):
        run_of("prompt", num_steps=1, warmup_steps=0).go_on_from(checkpoint)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "--steps 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"learning_rate": 0.0}, "--learning-rate 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"clip_norm": -1.0}, "--clip -1"),
        ({"schedule": "square"}, "--schedule square: one of constant, linear, cosine"),
        ({"warmup_steps": 6}, "--warmup-steps 6: less than the 6 steps"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TuningSettings(**{"num_steps": 6, **settings})  # type: ignore[arg-type]


def test_the_learning_rate() -> None:
    linear = TuningSettings(num_steps=6, warmup_steps=2, learning_rate=3.0)
    assert [round(linear.rate(step), 3) for step in range(6)] == [1.0, 2.0, 3.0, 2.25, 1.5, 0.75]
    cosine = TuningSettings(num_steps=4, schedule="cosine", learning_rate=1.0)
    assert [round(cosine.rate(step), 3) for step in range(4)] == [1.0, 0.854, 0.5, 0.146]
    assert TuningSettings(num_steps=4, schedule="constant", learning_rate=1.0).rate(3) == 1.0
    assert (steps_of(10, 1.5, 4), steps_of(1, 0.1, 4)) == (4, 1)
    with pytest.raises(ConfigError, match="--epochs 0"):
        steps_of(10, 0, 4)


def test_the_loss_in_pieces_is_the_loss() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(50, 8, generator=generator)
    states = torch.randn(2 * PIECE_ROWS + 7, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (len(states),), generator=generator)
    whole = torch.nn.functional.cross_entropy(states @ weight.T, labels, reduction="sum")
    (expected,) = torch.autograd.grad(whole * 0.5, states)
    found = next_token_loss(states, labels, lambda rows: rows @ weight.T)
    (grad,) = torch.autograd.grad(found * 0.5, states)
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(grad, expected)


def test_nothing_to_learn_and_wrong_sizes() -> None:
    base = whole_base()
    with pytest.raises(ConfigError, match="nothing to learn"):
        TunedModel(base)
    model = tiny_model_of("prompt", base)
    with pytest.raises(BadInput, match="lengths"):
        model.states(torch.ones(2, 3, dtype=torch.long), (4, 1))
    with pytest.raises(BadInput, match="outside the vocabulary"):
        model.states(torch.full((1, 3), 96), (3,))


def test_experts_that_share_a_tensor_take_no_lora() -> None:
    base = whole_base("qwen3_moe")
    method = Method(name="lora", targets=("gate_up_proj",))
    with pytest.raises(ConfigError) as raised:
        build(base, method, num_classes=0, seed=1)
    assert "--targets gate_up_proj: mlp.experts.gate_up_proj has the weights of all experts" in str(
        raised.value
    )
    assert "LoRA goes to" in str(raised.value)
    assert "self_attn.q_proj" in str(raised.value)
