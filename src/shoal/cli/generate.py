"""`shoal generate`: continue a prompt through a swarm."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from pathlib import Path
from typing import Annotated, Final

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
    ModelArgument,
    SwarmOption,
    ThreadsOption,
)
from shoal.cli.sizes import parse_size
from shoal.cli.threads import set_threads

PATIENCE_S: Final = 60.0
"""How long to look for a chain when servers are full, load or fail."""


PromptOption = Annotated[str | None, typer.Option(metavar="TEXT", help="The text to continue.")]
PromptFileOption = Annotated[
    Path | None, typer.Option(metavar="F", help="Read the prompt from a file, - for stdin.")
]
MaxNewTokensOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="Stop after this many tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", help="0 always takes the likeliest token (greedy).")
]
SeedOption = Annotated[
    int | None,
    typer.Option(metavar="S", help="Repeats a sampled answer (default: a new one each time)."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16, for the rows sent and for embedding and head "
        "(default: what most of the servers compute in)."
    ),
]
CompressOption = Annotated[
    bool,
    typer.Option(
        "--compress",
        help="Servers send each other 8-bit rows: half the bytes of bfloat16, for slow links. "
        "Lossy: the text may differ. What you send and get stays uncompressed.",
    ),
]
PatienceOption = Annotated[
    float,
    typer.Option(metavar="S", help="Seconds to wait for servers that are full or failing."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    model: ModelArgument,
    join: JoinOption = None,
    lan: LanOption = False,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    compress: CompressOption = False,
    threads: ThreadsOption = None,
    patience: PatienceOption = PATIENCE_S,
    weights_from_peers: FromPeersOption = False,
    cache_limit: CacheLimitOption = "50GB",
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, streaming the text to stdout.

    The prompt goes in as it is, without a chat template. MODEL must be the very model that
    the servers hold: embedding and head are computed here. If a server fails, another one
    with the same blocks takes over and the text goes on.

    With --weights-from-peers config, tokenizer, embedding, norm and head come from the swarm.
    A model's hash does not cover the tokenizer: peers must offer the same one, or you name the
    one you trust as HASH.FILES.

    With --json the last line on stdout is an object: text, token_ids (new ones only),
    prompt_tokens, time_to_first_token_s (from the start of opening the session),
    tokens_per_s (without the first token), chain, recoveries, numerics.

    \b
    Examples:
      shoal generate smollm2-135m-instruct --join ADDR --prompt "The sea is"
      shoal generate smollm2-135m-instruct --join ADDR --prompt-file story.txt \\
          --temperature 0.8 --seed 7 --max-new-tokens 200 --json
      shoal generate 2150765b1495 --join ADDR --weights-from-peers --prompt "The sea is"
    """
    set_threads(threads)
    choice = SwarmChoice.to_visit(join, swarm, invite, lan)
    text = read_prompt(prompt, prompt_file)
    with noticing_interrupts(signal.SIGINT):
        from shoal.cli.answering import GenerateSettings, answer_prompt, as_dict, summary
        from shoal.cli.models import open_model
        from shoal.hf.sampling import Sampler

        seed = secrets.randbits(63) if seed is None else seed
        settings = GenerateSettings(
            swarm=choice,
            prompt=text,
            max_new_tokens=max_new_tokens,
            sampler=Sampler(temperature=temperature, seed=seed),
            dtype=dtype,
            is_compressed=compress,
            patience_s=patience,
        )
        limit_bytes = parse_size(cache_limit, "--cache-limit")
        if weights_from_peers:
            from shoal.cli.peer_weights import fetch_for_client
        else:
            opened = open_model(model)
    if weights_from_peers:
        opened = asyncio.run(fetch_for_client(model, choice, limit_bytes))
    show = _discard if as_json else _print_piece
    text, answer = asyncio.run(answer_prompt(settings, opened, show))
    if as_json:
        print(json.dumps(as_dict(text, answer)), flush=True)
    else:
        print(flush=True)
        print(summary(answer), file=sys.stderr)


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt that the two options name.

    Raises:
        ConfigError: none, both, empty, or a file that can't be read as UTF-8.
    """
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give either --prompt TEXT or --prompt-file F")
    if prompt is None and prompt_file is not None:
        try:
            is_stdin = str(prompt_file) == "-"
            prompt = sys.stdin.read() if is_stdin else prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read the prompt from {prompt_file}: {error}") from error
    if not prompt:
        raise ConfigError("the prompt is empty; give at least one character")
    return prompt


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _discard(text: str) -> None:
    """With --json the text comes at the end."""
