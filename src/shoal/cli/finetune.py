"""`shoal finetune`: teach a model something through a swarm that keeps it frozen."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.interrupts import noticing_interrupts
from shoal.cli.joining import SwarmChoice
from shoal.cli.options import (
    CacheLimitOption,
    FromPeersOption,
    InviteOption,
    JoinOption,
    JsonOption,
    LanOption,
    OptionalModelArgument,
    SwarmOption,
    ThreadsOption,
)
from shoal.cli.sizes import parse_size
from shoal.cli.threads import set_threads

if TYPE_CHECKING:
    from shoal.cli.finetune_spec import Asked

PATIENCE_S: Final = 120.0
"""How long to look for servers: a run of hours should outlive a restart."""

NOT_WITH_RESUME: Final = (
    "data", "method", "out", "eval_data", "eval_share", "max_length", "steps", "epochs",
    "batch_size", "accumulate", "learning_rate", "schedule", "warmup_steps", "weight_decay",
    "clip", "prompt_tokens", "rank", "alpha", "dropout", "targets", "eval_every", "save_every",
    "seed", "from_adapter",
)  # fmt: skip
"""Options that the checkpoint answers itself."""

NOT_WITH_ADAPTER: Final = ("method", "rank", "alpha", "targets", "prompt_tokens")
"""Options that an adapter to begin at answers itself."""

DataOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Examples, one JSON object a line (see below)."),
]
MethodOption = Annotated[
    str, typer.Option(metavar="NAME", help="lora, prompt, deep-prompt or classifier.")
]
OutOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where result, checkpoint and curve go.")
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Go on with the run in DIR, also after it was killed."),
]
FromStepOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="With --resume: go on from a checkpoint that --verify-rate kept."
    ),
]
FromAdapterOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Begin at an adapter, ours or PEFT's, instead of at nothing: method and sizes are "
        "as there.",
    ),
]
LocalOption = Annotated[
    bool,
    typer.Option("--local", help="Without a swarm: the whole model in this process."),
]
EvalDataOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Examples to evaluate with.")
]
EvalShareOption = Annotated[
    float,
    typer.Option(metavar="X", help="Without --eval-data: share of --data to keep back for that."),
]
EpochsOption = Annotated[
    float, typer.Option(metavar="N", help="How often every example is learned from.")
]
StepsOption = Annotated[
    int | None, typer.Option(metavar="N", help="Optimiser steps, instead of --epochs.")
]
BatchOption = Annotated[int, typer.Option(metavar="N", help="Examples of one pass.")]
AccumulateOption = Annotated[
    int, typer.Option(metavar="N", help="Passes of one step: their gradients add up.")
]
MaxLengthOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Cut examples after so many tokens; servers take 2048 unless told otherwise "
        "(shoal serve --training-rows).",
    ),
]
RateOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Default: by method (see docs/finetuning.md)."),
]
ScheduleOption = Annotated[
    str, typer.Option(metavar="NAME", help="The learning rate: constant, linear or cosine (to 0).")
]
WarmupOption = Annotated[
    int, typer.Option(metavar="N", help="Steps over which the learning rate rises first.")
]
DecayOption = Annotated[float, typer.Option(metavar="X", help="AdamW's weight decay.")]
ClipOption = Annotated[
    float, typer.Option(metavar="X", help="Cut gradients to this length; 0: never.")
]
PromptTokensOption = Annotated[
    int,
    typer.Option(metavar="N", help="Length of the prompt; classifier: 0 learns only the head."),
]
RankOption = Annotated[int, typer.Option(metavar="N", help="lora: rank.")]
AlphaOption = Annotated[float, typer.Option(metavar="X", help="lora: scale, times rank.")]
DropoutOption = Annotated[float, typer.Option(metavar="X", help="lora: dropout, from 0 to 1.")]
TargetsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="lora: a linear layer of the blocks, q_proj or self_attn.q_proj; repeat for more "
        "(default: query and value).",
    ),
]
EvalEveryOption = Annotated[
    int, typer.Option(metavar="N", help="Steps between evaluations; 0: only at the end.")
]
SaveEveryOption = Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints.")]
SeedOption = Annotated[int, typer.Option(metavar="S", help="Of order, split, start and dropout.")]
PatienceOption = Annotated[
    float,
    typer.Option(metavar="S", help="Seconds to wait for servers that are missing or failing."),
]
VerifyOption = Annotated[
    float,
    typer.Option(
        metavar="X",
        min=0.0,
        max=1.0,
        help="Have this share of what servers compute done again by others with the same blocks, "
        "and leave those who give other values than two more do. It costs as much more computing.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("finetune")(finetune)


def finetune(
    context: typer.Context,
    model: OptionalModelArgument = None,
    join: JoinOption = None,
    lan: LanOption = False,
    local: LocalOption = False,
    data: DataOption = None,
    method: MethodOption = "lora",
    out: OutOption = None,
    resume: ResumeOption = None,
    from_step: FromStepOption = None,
    from_adapter: FromAdapterOption = None,
    eval_data: EvalDataOption = None,
    eval_share: EvalShareOption = 0.1,
    epochs: EpochsOption = 1.0,
    steps: StepsOption = None,
    batch_size: BatchOption = 4,
    accumulate: AccumulateOption = 1,
    max_length: MaxLengthOption = 512,
    learning_rate: RateOption = None,
    schedule: ScheduleOption = "linear",
    warmup_steps: WarmupOption = 0,
    weight_decay: DecayOption = 0.0,
    clip: ClipOption = 1.0,
    prompt_tokens: PromptTokensOption = 16,
    rank: RankOption = 8,
    alpha: AlphaOption = 16.0,
    dropout: DropoutOption = 0.0,
    targets: TargetsOption = None,
    eval_every: EvalEveryOption = 0,
    save_every: SaveEveryOption = 20,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
    patience: PatienceOption = PATIENCE_S,
    verify_rate: VerifyOption = 0.0,
    weights_from_peers: FromPeersOption = False,
    cache_limit: CacheLimitOption = "50GB",
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a model something: what is learned is yours, the servers' weights stay as they are.

    Servers run the blocks forward and backward and keep nothing. You hold what is learned and
    the optimiser. A server that dies costs its part of one pass; the numbers stay the same.

    \b
    Methods:
      lora         low-rank additions to linear layers inside the blocks (PEFT format)
      prompt       embeddings that stand before every text (PEFT format)
      deep-prompt  the same, and additions to its positions before every block
      classifier   a head that tells classes, and a prompt (PEFT format)

    \b
    Lines of --data, one kind a file:
      {"text": "..."}                           learned as a whole
      {"prompt": "...", "completion": "..."}    only the completion is learned
      {"messages": [{"role": "user", "content": "..."}, ...]}
                                                the model's chat template; answers are learned
      {"text": "...", "label": "..."}           for --method classifier

    DIR gets the adapter (adapter_model.safetensors, adapter_config.json), training.json,
    loss.png (with matplotlib) and checkpoint.safetensors. Ctrl-C finishes the step and saves;
    --resume DIR goes on with the same numbers as if nothing had happened, also after a kill
    (from the last checkpoint). Use the result with shoal generate --adapter DIR.

    With --json stdout gets one object at the end: out, steps, loss_first, loss_last, eval_loss,
    eval_accuracy, parameters, tokens_per_s.

    \b
    Examples:
      shoal finetune smollm2-135m-instruct --join ADDR --data chats.jsonl --out tuned
      shoal finetune smollm2-135m-instruct --join ADDR --data moods.jsonl \\
          --method classifier --epochs 3 --out moods
      shoal finetune --resume tuned --join ADDR
      shoal finetune smollm2-135m-instruct --join ADDR --data more.jsonl \\
          --from-adapter tuned --out tuned-more
      shoal finetune 2150765b1495 --join ADDR --weights-from-peers --data chats.jsonl --out tuned
      shoal generate smollm2-135m-instruct --join ADDR --adapter tuned --prompt "..."
    """
    set_threads(threads)
    if local and (join or lan):
        raise ConfigError("--local and --join or --lan: give one")
    if from_step is not None and resume is None:
        raise ConfigError("--from-step goes with --resume DIR: a run that is there already")
    if local and (weights_from_peers or verify_rate):
        raise ConfigError("--local asks no servers: leave --weights-from-peers, --verify-rate out")
    limit_bytes = parse_size(cache_limit, "--cache-limit") if weights_from_peers else None
    choice = None if local else SwarmChoice.to_visit(join, swarm, invite, lan)
    if resume is not None:
        _check_left_out(
            context, NOT_WITH_RESUME, f"with --resume that is as the run in {resume} began"
        )
    elif model is None or data is None or out is None:
        raise ConfigError("give MODEL, --data FILE and --out DIR, or --resume DIR")
    elif from_adapter is not None:
        _check_left_out(
            context, NOT_WITH_ADAPTER, f"with --from-adapter that is as in {from_adapter}"
        )
    with noticing_interrupts(signal.SIGINT):
        from shoal.cli.finetuning import begin, go_on
        from shoal.cli.tuning_place import Place

        place = Place(
            swarm=choice, patience_s=patience, limit_bytes=limit_bytes, verify_rate=verify_rate
        )
        if resume is None:
            work = begin(place, _asked(context.params))
        else:
            work = go_on(place, resume, model, from_step)
    with work:
        report = work.train()
    if as_json:
        print(json.dumps(report), flush=True)
    else:
        print(f"saved {report['out']}", flush=True)


def _asked(options: dict[str, Any]) -> Asked:
    """The options of a new run, checked."""
    from shoal.cli.finetune_spec import Asked, DataChoice
    from shoal.hf.tuning_build import LEARNING_RATES, Method
    from shoal.hf.tuning_settings import TuningSettings

    method = Method(
        name=options["method"],
        targets=tuple(options["targets"] or ()),
        **{name: options[name] for name in ("prompt_tokens", "rank", "alpha", "dropout")},
    )
    data = DataChoice(
        path=options["data"].absolute(),
        eval_path=None if options["eval_data"] is None else options["eval_data"].absolute(),
        eval_share=options["eval_share"],
        length_max=options["max_length"],
        seed=options["seed"],
    )
    rate = options["learning_rate"]
    settings = TuningSettings(
        # Without --steps the epochs tell, once the examples are counted.
        num_steps=options["warmup_steps"] + 1 if options["steps"] is None else options["steps"],
        learning_rate=LEARNING_RATES[method.name] if rate is None else rate,
        clip_norm=options["clip"],
        **{
            name: options[name]
            for name in (
                "batch_size", "accumulate", "schedule", "warmup_steps", "weight_decay",
                "eval_every", "save_every", "seed",
            )
        },
    )  # fmt: skip
    return Asked(
        given=options["model"],
        out=options["out"],
        data=data,
        method=method,
        settings=settings,
        epochs=options["epochs"] if options["steps"] is None else None,
        start=options["from_adapter"],
        has_rate=rate is not None,
    )


def _check_left_out(context: typer.Context, names: Sequence[str], why: str) -> None:
    """See that nothing is asked which is decided already.

    Raises:
        ConfigError: names the option.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')}: {why}; leave it out")
