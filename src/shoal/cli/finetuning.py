"""What `shoal finetune` does: open, read, train, save; go on from a checkpoint."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shoal.base.errors import ConfigError, ShoalError
from shoal.base.ids import short
from shoal.cli.finetune_curve import draw_curve, smoothed, text_curve, worsened
from shoal.cli.finetune_kept import KeptCheckpoints
from shoal.cli.finetune_progress import Stopping, TrainingLine
from shoal.cli.finetune_spec import Asked, Examples, RunSpec, read_examples
from shoal.cli.finetune_suspects import Suspects
from shoal.cli.models import OpenModel
from shoal.cli.tuning_place import Place, open_base, open_model_for
from shoal.client.training_check import Disputed, SpotChecks
from shoal.hf.saved_session import write_file
from shoal.hf.tuning_build import LEARNING_RATES, build
from shoal.hf.tuning_checkpoint import (
    CHECKPOINT,
    Checkpoint,
    Evaluated,
    StepDone,
    read_checkpoint,
)
from shoal.hf.tuning_files import CONFIG, TENSORS, write_result
from shoal.hf.tuning_loop import TuningRun
from shoal.hf.tuning_settings import steps_of
from shoal.hf.tuning_start import Start, read_start
from shoal.hf.tuning_swarm import SwarmBase

RECORD: Final = "training.json"
CURVE: Final = "loss.png"


class StoppedBetweenSteps(KeyboardInterrupt):
    """The first Ctrl-C: the run is whole."""


class Finetuning:
    """A run with all it needs. A context manager; made by `begin` and `go_on`."""

    def __init__(
        self, spec: RunSpec, out: Path, examples: Examples, run: TuningRun, config: Any
    ) -> None:
        self.spec = spec
        self.run = run
        self.stack = ExitStack()
        self._out = out
        self._kept = KeptCheckpoints(out)
        self._examples = examples
        self._config = config

    def __enter__(self) -> Finetuning:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stack.close()

    def train(self) -> dict[str, Any]:
        """Do the steps that are left, and write what was learned; for `--json`.

        Raises:
            KeyboardInterrupt: Ctrl-C; the run was saved, if it was pressed once.
            ShoalError: it can't go on; the run was saved.
        """
        self._tell_beginning()
        self.save()
        try:
            with Stopping().noticing() as stopping:
                self._advance(stopping)
        except (ShoalError, StoppedBetweenSteps) as error:
            self.save()
            self._tell_how_to_go_on(error)
            raise
        except KeyboardInterrupt as error:
            # Amid a step, which may be half done: the last checkpoint is the state to go on from.
            self._tell_how_to_go_on(error)
            raise
        return self._finish()

    def _advance(self, stopping: Stopping) -> None:
        history, every = self.run.history, self.spec.settings.save_every
        line = TrainingLine(self.spec.settings.num_steps, len(history.steps))
        suspects, base = Suspects(len(history.steps), self._kept.steps), self.run.model.base
        watching = line.watching(base.missing) if isinstance(base, SwarmBase) else nullcontext()

        def tell(event: StepDone | Evaluated | ShoalError) -> None:
            if isinstance(base, SwarmBase):
                for text in news(suspects, base.checked(), event, len(history.steps)):
                    line.say(text)

        with line.shown(), watching:
            try:
                for event in self.run.advance():
                    if isinstance(event, StepDone):
                        line.stepped(event)
                        tell(event)
                        if event.step % every == 0:
                            self.save()
                    else:
                        line.evaluated(event)
                        tell(event)
                    if stopping.is_asked and self.run.steps_left:
                        raise StoppedBetweenSteps
            except ShoalError as error:
                tell(error)
                raise

    def save(self) -> None:
        """Write a checkpoint. Where a server may be caught later, those before are kept too."""
        self.run.save(self._out / CHECKPOINT, self.spec.as_dict())
        base, step = self.run.model.base, len(self.run.history.steps)
        if step and isinstance(base, SwarmBase) and base.checked().rate:
            self._kept.keep(step, lambda path: self.run.save(path, self.spec.as_dict()))

    def _finish(self) -> dict[str, Any]:
        """Save the end, the result and the curve."""
        self.save()
        model = self.run.model
        write_result(
            self._out, model, config=self._config, given=self.spec.given,
            label_names=self._examples.label_names,
        )  # fmt: skip
        history = self.run.history
        losses = [one.loss for one in history.steps]
        print(text_curve(losses), file=sys.stderr)
        title = f"{self.spec.given}, {self.spec.method.name}"
        if not draw_curve(history, self._out / CURVE, title):
            print(f"no {CURVE}: pip install 'shoal[draw]'", file=sys.stderr)
        report = self._report()
        record = {"report": report, "run": self.spec.as_dict(), "history": history.as_dict()}
        write_file(self._out / RECORD, (json.dumps(record, indent=1) + "\n").encode())
        self._tell_end(report)
        return report

    def _report(self) -> dict[str, Any]:
        steps, found = self.run.history.steps, self.run.history.evaluations
        last = smoothed([one.loss for one in steps])[-1]
        return {
            "out": str(self._out),
            "steps": len(steps),
            "loss_first": steps[0].loss,
            "loss_last": last,
            "eval_loss": found[-1].loss if found else None,
            "eval_accuracy": found[-1].accuracy if found else None,
            "parameters": self.run.num_parameters,
            "tokens_per_s": sum(one.num_tokens for one in steps)
            / max(1e-9, sum(one.duration_s for one in steps)),
        }

    def _tell_beginning(self) -> None:
        learned, back = self._examples.learned, self._examples.kept_back
        done = len(self.run.history.steps)
        parts = [
            f"{len(learned.examples)} examples",
            f"{0 if back is None else len(back.examples)} to evaluate with",
            f"{self.run.num_parameters:,} values to learn",
        ]
        if learned.num_cut:
            parts.append(f"{learned.num_cut} examples cut to {self.spec.data.length_max} tokens")
        if learned.num_left_out:
            parts.append(f"{learned.num_left_out} left out: nothing to learn was left of them")
        if done:
            parts.append(f"going on after step {done}")
        print(", ".join(parts), file=sys.stderr)

    def _tell_how_to_go_on(self, error: BaseException) -> None:
        why = "stopped" if isinstance(error, KeyboardInterrupt) else "could not go on"
        print(
            f"{why} after step {len(self.run.history.steps)}; go on with: "
            f"shoal finetune --resume {self._out} --join ADDR",
            file=sys.stderr,
        )

    def _tell_end(self, report: dict[str, Any]) -> None:
        texts = [f"loss {report['loss_first']:.4f} -> {report['loss_last']:.4f}"]
        if report["eval_loss"] is not None:
            texts.append(f"evaluation {report['eval_loss']:.4f}")
        if report["eval_accuracy"] is not None:
            texts.append(f"{report['eval_accuracy']:.1%} right")
        texts.append(f"{report['tokens_per_s']:.0f} tokens/s")
        print(", ".join(texts), file=sys.stderr)
        if worse := worsened(self.run.history):
            print(
                f"the loss ended higher than it began ({worse[0]:.4f} -> {worse[1]:.4f}): the "
                "result is worse than nothing; begin anew with a lower --learning-rate "
                f"(it was {self.spec.settings.learning_rate:g})",
                file=sys.stderr,
            )
        is_asked = self._examples.is_chat and self.spec.method.name != "deep-prompt"
        way = f"shoal {'chat' if is_asked else 'generate'} {self.spec.given} --join ADDR"
        question = "" if is_asked else ' --prompt "..."'
        print(f"use it: {way} --adapter {self._out}{question}", file=sys.stderr)
        base = self.run.model.base
        if isinstance(base, SwarmBase) and base.checked().rate:
            print(checks_text(base.checked()), file=sys.stderr)


def news(
    suspects: Suspects, checks: SpotChecks, event: StepDone | Evaluated | ShoalError, done: int
) -> list[str]:
    """What is to be told of servers that lie after an event, `done` steps being made."""
    if isinstance(event, StepDone):
        return suspects.stepped(event.step, checks.taken, checks.caught)
    where = f"in the evaluation after step {done}"
    if isinstance(event, ShoalError):
        where = f"in step {done + 1}, which was broken off,"
    texts = suspects.between(where, checks.taken, checks.caught)
    return texts + (suspects.disputed(event.peers) if isinstance(event, Disputed) else [])


def checks_text(checks: SpotChecks) -> str:
    """What spot checks found, for a person."""
    text = f"computed twice: {checks.passed} parts, the same values"
    if checks.unchecked:
        text += f"; {checks.unchecked} were due, and no other server could compute them"
    if checks.caught:
        text += f"; wrong values from {', '.join(short(peer) for peer in checks.caught)}"
    return text


def begin(place: Place, asked: Asked) -> Finetuning:
    """A new run at its first step.

    Raises:
        ConfigError: data that can't be used or is too long for servers, a folder that holds a
            run or an adapter already, an option.
        ModelError: unknown, broken or unsupported.
        NoRouteError, PeerError: no swarm.
    """
    if (asked.out / CHECKPOINT).exists():
        raise ConfigError(
            f"{asked.out} holds a run already: go on with --resume {asked.out}, or give another "
            "--out"
        )
    for name in (CONFIG, TENSORS):
        if (asked.out / name).exists():
            raise ConfigError(
                f"{asked.out} holds an adapter ({name}) that would be overwritten: give another "
                "--out"
            )
    model = open_model_for(place, asked.given)
    start, method = None, asked.method
    if asked.start is not None:
        start = read_start(asked.start, asked.method, model.source.config)
        method = start.method
    examples = read_examples(asked.data, method, model.source.tokenizer())
    if start is not None:
        start.check_labels(examples.label_names)
    settings = asked.settings
    if not asked.has_rate:
        settings = replace(settings, learning_rate=LEARNING_RATES[method.name])
    if asked.epochs is not None:
        count = steps_of(len(examples.learned.examples), asked.epochs, settings.per_step)
        settings = replace(settings, num_steps=count)
    spec = RunSpec(
        model=model.name, given=asked.given, data=asked.data, method=method,
        settings=settings, fingerprint=examples.fingerprint(),
    )  # fmt: skip
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {asked.out}: {error.strerror}") from error
    return _opened(place, spec, asked.out, examples, model, start)


def go_on(
    place: Place, folder: Path, given: str | None, from_step: int | None = None
) -> Finetuning:
    """The run in a folder, where its checkpoint left it, or after a step before.

    Raises:
        ConfigError: no run, another model, or examples that have changed since.
        ModelError, NoRouteError, PeerError: as `begin`.
    """
    path = folder / CHECKPOINT
    if from_step is not None:
        kept = KeptCheckpoints(folder)
        path = kept.path(from_step)
        if not path.is_file():
            there = ", ".join(map(str, kept.steps())) or "none"
            raise ConfigError(
                f"--from-step {from_step}: {path} is not there; runs with --verify-rate keep some "
                f"(here: {there})"
            )
    checkpoint = read_checkpoint(path)
    spec = RunSpec.from_dict(checkpoint.run, path)
    by_hash = place.limit_bytes is not None
    model = open_model_for(place, given or (spec.model if by_hash else spec.given))
    if model.name != spec.model:
        raise ConfigError(
            f"the run in {folder} trains model {spec.model} ({spec.given}), not {model.name}"
        )
    examples = read_examples(spec.data, spec.method, model.source.tokenizer())
    if examples.fingerprint() != spec.fingerprint:
        raise ConfigError(
            f"{spec.data.path} has changed since the run in {folder} began: put it back, or begin "
            "anew"
        )
    return _opened(place, spec, folder, examples, model, checkpoint)


def _opened(
    place: Place,
    spec: RunSpec,
    out: Path,
    examples: Examples,
    model: OpenModel,
    begins: Checkpoint | Start | None,
) -> Finetuning:
    if place.swarm is not None:
        examples.check_lengths(spec.method)
    with ExitStack() as stack:
        base = open_base(place, model, stack)
        tuned = build(
            base, spec.method, num_classes=len(examples.label_names), seed=spec.settings.seed
        )
        run = TuningRun(
            tuned, spec.settings, examples.learned, examples.kept_back, time.perf_counter
        )
        if isinstance(begins, Checkpoint):
            run.go_on_from(begins)
        elif begins is not None:
            begins.put_into(tuned)
        work = Finetuning(spec, out, examples, run, model.source.config)
        work.stack = stack.pop_all()
    return work
