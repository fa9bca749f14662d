"""`shoal ring run`: samples round a ring that is up."""

from __future__ import annotations

import asyncio
import secrets
import signal
from pathlib import Path
from typing import Annotated

import typer

from shoal.base.errors import ConfigError
from shoal.cli.generate import (
    PATIENCE_S,
    DtypeOption,
    MaxNewTokensOption,
    PatienceOption,
    SeedOption,
    TemperatureOption,
)
from shoal.cli.interrupts import noticing_interrupts
from shoal.cli.joining import SwarmChoice
from shoal.cli.options import (
    InviteOption,
    JoinOption,
    JsonOption,
    LanOption,
    SwarmOption,
    ThreadsOption,
)
from shoal.cli.ring_file import RingOption, find_ring
from shoal.cli.threads import set_threads

PromptsOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="A text to continue; repeat for more."),
]
PromptsFileOption = Annotated[
    Path | None,
    typer.Option(
        metavar="F",
        help="Read prompts from a file, - for stdin: paragraphs, with blank lines between them.",
    ),
]


def register(group: typer.Typer) -> None:
    """Add the command to `shoal ring`."""
    group.command("run")(run)


def run(
    prompt: PromptsOption = None,
    prompts_file: PromptsFileOption = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="How many texts; prompts are taken in turn (default: one for each prompt).",
        ),
    ] = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    slots: Annotated[
        int | None,
        typer.Option(
            metavar="S",
            min=1,
            help="Groups of samples under way at a time (default: what gives most tokens/s by "
            "what is measured).",
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Samples that may hold cache at the same time (default: as many as fit).",
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a line SECONDS,TOKENS for each token: all samples, from the start.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the same as a PNG (needs matplotlib).")
    ] = None,
    dtype: DtypeOption = None,
    patience: PatienceOption = PATIENCE_S,
    threads: ThreadsOption = None,
    ring: RingOption = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="With --join or --lan: the model that is served there."),
    ] = None,
    join: JoinOption = None,
    lan: LanOption = False,
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue many texts at the same time round a ring, so that no node idles.

    Run it where the ring's starter runs: embedding and head are computed here. While one sample
    is at the second node the next one is at the first; with more samples than nodes they go in
    slots of several, so that weights are read once for all of a slot. How many slots is chosen
    by the times that nodes measured and by whole trips round the ring, and again whenever
    samples come or end or a node gets slower. Samples end at the model's end token, which frees
    their memory for the next.

    Texts are printed as they end; a table on stderr shows the nodes while they work: blocks,
    memory, how busy each was (the rest is the bubble). If a node dies, its blocks are served
    by another and the texts go on. A sample that fails is told at the end, with exit code 1; the
    others finish. Ctrl-C ends the run, not the ring.

    Any other chain of servers will do, too: name it by --join ADDR --model MODEL.

    With --json one object comes at the end: samples (text, token_ids, prompt, prompt_tokens,
    time_to_first_token_s, tokens_per_s, recoveries, numerics; prompt and error of one that
    failed), tokens, seconds, tokens_per_s, slots, rows, nodes.

    \b
    Examples:
      shoal ring run --prompt "The sea is" --samples 6 --max-new-tokens 64
      shoal ring run --prompts-file prompts.txt --csv tokens.csv --plot tokens.png
      shoal ring run --join ADDR --model smollm2-135m-instruct --prompt "The sea is" --samples 4
    """  # fmt: skip
    set_threads(threads)
    with noticing_interrupts(signal.SIGINT):
        from shoal.cli.models import open_model
        from shoal.cli.ring_run_text import read_prompts, taken_in_turn
        from shoal.cli.ring_run_work import RingRunSettings, run_ring
        from shoal.hf.ring import RingChoice
        from shoal.hf.sampling import Sampler

        prompts = read_prompts(prompt, prompts_file)
        choice, given = _place(ring, model, SwarmChoice.parse(join, swarm, invite, lan))
        opened = open_model(given)
    first_seed = secrets.randbits(62) if seed is None else seed
    chosen = taken_in_turn(prompts, samples)
    settings = RingRunSettings(
        swarm=choice,
        prompts=tuple(chosen),
        max_new_tokens=max_new_tokens,
        samplers=tuple(
            Sampler(temperature=temperature, seed=first_seed + number)
            for number in range(len(chosen))
        ),
        choice=RingChoice(slots=slots, at_once=at_once),
        dtype=dtype,
        patience_s=patience,
        csv=csv,
        plot=plot,
        is_json=as_json,
    )
    if not asyncio.run(run_ring(settings, opened)):
        raise typer.Exit(1)


def _place(ring: Path | None, model: str | None, choice: SwarmChoice) -> tuple[SwarmChoice, str]:
    """The swarm, and the model as a person names it here.

    Raises:
        ConfigError: no ring is up, or a chain without a model.
    """
    if choice.joins or choice.is_lan:
        if ring is not None:
            raise ConfigError("--ring and --join: give one; the ring's file says where it is")
        if model is None:
            raise ConfigError("which model is served there? Add --model MODEL")
        return choice, model
    found = find_ring(ring)
    return found.choice(), model or found.given
