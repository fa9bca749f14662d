"""`shoal generate`: continue a prompt through a swarm."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.adapters import AdapterOption, check_adapter
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
from shoal.cli.waiting import WaitingLine

if TYPE_CHECKING:
    from shoal.cli.answering import GenerateSettings, Question, Written
    from shoal.cli.models import OpenModel
    from shoal.hf.saved_answer import SavedAnswer

PATIENCE_S: Final = 60.0

STANDBY_MAX: Final = 2
"""Standbys for each hop that make sense: each costs as much as the hop itself."""
"""How long to look for a chain when servers are missing, full, load or fail."""

NOT_WITH_RESUME: Final = ("prompt", "prompt_file", "temperature", "seed", "dtype", "compress")
"""Options that the file of an answer answers itself."""


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
    typer.Option(
        metavar="S", help="Seconds to wait for servers that are missing, full or failing."
    ),
]
StandbyOption = Annotated[
    int,
    typer.Option(
        "--standby",
        min=0,
        max=STANDBY_MAX,
        help="Servers beside each one of the chain that keep up with it: when it dies, one of "
        "them takes over within a moment. They compute everything as well.",
    ),
]
ThinOption = Annotated[
    bool,
    typer.Option(
        "--thin",
        help="Hold no weights here: a server with a head (shoal serve --with-head) embeds and "
        "chooses tokens, and reads the text. If it dies, another one goes on.",
    ),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Keep the answer in FILE while it comes, so that --resume can go on."
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Go on with the answer in FILE, also after this command was killed: the same "
        "tokens. Goes on saving there.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    context: typer.Context,
    model: OptionalModelArgument = None,
    join: JoinOption = None,
    lan: LanOption = False,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    compress: CompressOption = False,
    thin: ThinOption = False,
    save: SaveOption = None,
    resume: ResumeOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = None,
    patience: PatienceOption = PATIENCE_S,
    standby: StandbyOption = 0,
    weights_from_peers: FromPeersOption = False,
    cache_limit: CacheLimitOption = "50GB",
    swarm: SwarmOption = None,
    invite: InviteOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, streaming the text to stdout.

    The prompt goes in as it is, without a chat template. MODEL must be the very model that
    the servers hold: embedding and head are computed here, but with --thin. If a server fails,
    another one with the same blocks takes over and the text goes on; where there is none, the
    command says on stderr what it waits for, until --patience is over. With --standby 1 every
    server has another one beside it that keeps up with it: its death then costs a moment, however
    long the text is.

    With --save FILE an answer outlives this command: --resume FILE shows the text so far and
    goes on, with the same tokens as if nothing had happened, greedy or sampled. MODEL and how
    tokens are chosen are in the file; --max-new-tokens may be raised. Only you can read it.

    With --weights-from-peers config, tokenizer, embedding, norm and head come from the swarm.
    A model's hash does not cover the tokenizer: peers must offer the same one, or you name the
    one you trust as HASH.FILES.

    With --json the last line on stdout is an object: text, token_ids (new ones only),
    prompt_tokens, resumed_tokens (new ones that were in FILE), time_to_first_token_s (from the
    start of opening the session), tokens_per_s (without the first token), chain, recoveries,
    moves, numerics.

    \b
    Examples:
      shoal generate smollm2-135m-instruct --join ADDR --prompt "The sea is"
      shoal generate smollm2-135m-instruct --join ADDR --prompt-file story.txt \\
          --temperature 0.8 --seed 7 --max-new-tokens 200 --json
      shoal generate smollm2-135m-instruct --join ADDR --prompt "The sea is" --save sea.shoal
      shoal generate --resume sea.shoal --join ADDR
      shoal generate smollm2-135m-instruct --join ADDR --adapter ./my-lora --prompt "The sea is"
      shoal generate 2150765b1495 --join ADDR --weights-from-peers --prompt "The sea is"
    """
    set_threads(threads)
    choice = SwarmChoice.to_visit(join, swarm, invite, lan)
    given = _given(context)
    if resume is not None:
        _check_resumes(given, resume)
    elif model is None:
        raise ConfigError("which model? Give MODEL, or --resume FILE of an answer")
    text = read_prompt(prompt, prompt_file) if resume is None else ""
    limit_bytes = parse_size(cache_limit, "--cache-limit") if weights_from_peers else None
    with noticing_interrupts(signal.SIGINT):
        from shoal.cli.answer_file import check_model_of, load_answer, model_of
        from shoal.cli.answering import GenerateSettings, Question
        from shoal.hf.sampling import Sampler

        task: Question | SavedAnswer
        if resume is None:
            seed = secrets.randbits(63) if seed is None else seed
            task = Question(
                prompt=text,
                max_new_tokens=max_new_tokens,
                sampler=Sampler(temperature=temperature, seed=seed),
                dtype=dtype,
                is_compressed=compress,
            )
        else:
            task = load_answer(resume)
            if "max_new_tokens" in given:
                task = task.raised(max_new_tokens)
            if model is None or "model" not in given:
                model = model_of(task, resume, is_from_peers=weights_from_peers)
        opened = _open(model or "", choice, limit_bytes, is_thin=thin)
    if isinstance(task, Question) and _is_whole(adapter):
        _check_whole(given)
        _answer_whole(task, opened, choice, str(adapter), patience, as_json=as_json)
        return
    if resume is not None and not isinstance(task, Question):
        check_model_of(task, opened, resume)
    line = WaitingLine()
    settings = GenerateSettings(
        swarm=choice,
        task=task,
        patience_s=patience,
        save=save or resume,
        on_waiting=line.told,
        standby=check_thin(standby, is_thin=thin),
        is_thin=thin,
        adapter=check_adapter(adapter, is_thin=thin),
    )
    _answer(settings, opened, line, as_json=as_json)


def _is_whole(adapter: str | None) -> bool:
    """Whether `--adapter` names something that has no sessions: deep prompts, classes."""
    if adapter is None or not Path(adapter).is_dir():
        return False
    from shoal.cli.learned import runs_whole

    return runs_whole(adapter)


def _check_whole(given: frozenset[str]) -> None:
    """See that nothing is asked which only sessions can do.

    Raises:
        ConfigError: names the option.
    """
    for name in ("save", "thin", "standby", "compress", "dtype"):
        if name in given:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: not with deep prompts or classes; leave it out")


def _answer_whole(
    task: Question,
    model: OpenModel,
    choice: SwarmChoice,
    directory: str,
    patience_s: float,
    *,
    as_json: bool,
) -> None:
    """Print a text's class, or what goes on behind a deep prompt."""
    from shoal.cli.learned import WholeQuestion, answer_whole
    from shoal.cli.tuning_place import Place

    question = WholeQuestion(
        text=task.prompt,
        max_new_tokens=task.max_new_tokens,
        sampler=task.sampler,
        is_json=as_json,
    )
    place = Place(swarm=choice, patience_s=patience_s)
    answer_whole(question, Path(directory), model, place)


def check_thin(standby: int, *, is_thin: bool) -> int:
    """The standbys, which only a client of the chain itself can have.

    Raises:
        ConfigError: both are asked for.
    """
    if is_thin and standby:
        raise ConfigError("--standby and --thin: give one; the server with the head owns the chain")
    return standby


def _open(model: str, choice: SwarmChoice, limit_bytes: int | None, *, is_thin: bool) -> OpenModel:
    """The model, from here or (with a limit to the store) from the swarm."""
    if limit_bytes is None:
        from shoal.cli.models import open_model

        return open_model(model)
    from shoal.cli.peer_weights import fetch_for_client

    return asyncio.run(fetch_for_client(model, choice, limit_bytes, is_thin=is_thin))


def _answer(
    settings: GenerateSettings, model: OpenModel, line: WaitingLine, *, as_json: bool
) -> None:
    """Run it and print what came of it."""
    from shoal.cli.answering import answer_prompt, as_dict, summary

    paper = _Paper()
    line.break_line = paper.break_line
    try:
        written: Written = asyncio.run(
            answer_prompt(settings, model, _discard if as_json else paper.write)
        )
    except BaseException:
        paper.break_line()
        if settings.save is not None and settings.save.exists():
            print(
                f"the answer so far is in {settings.save}; go on with: "
                f"shoal generate --resume {settings.save} --join ADDR",
                file=sys.stderr,
            )
        raise
    if as_json:
        print(json.dumps(as_dict(written.text, written.answer, written.num_resumed)), flush=True)
    else:
        print(flush=True)
        print(summary(written.answer, written.num_resumed), file=sys.stderr)


def _given(context: typer.Context) -> frozenset[str]:
    """Parameters that stand on the command line itself, not in a file or the environment."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return frozenset(
        name for name, source in sources.items() if source and source.name == "COMMANDLINE"
    )


def _check_resumes(given: frozenset[str], path: Path) -> None:
    """See that nothing is asked which the file decides.

    Raises:
        ConfigError: names the option.
    """
    for name in NOT_WITH_RESUME:
        if name in given:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option}: with --resume that is as {path} says; leave it out")


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


class _Paper:
    """Stdout, and whether the text has left the cursor within a line."""

    def __init__(self) -> None:
        self._is_midline = False

    def write(self, text: str) -> None:
        print(text, end="", flush=True)
        if text:
            self._is_midline = not text.endswith("\n")

    def break_line(self) -> None:
        """What goes to stderr next should begin a line, where a person sees both."""
        if self._is_midline and sys.stdout.isatty():
            print(file=sys.stderr, flush=True)
            self._is_midline = False


def _discard(text: str) -> None:
    """With --json the text comes at the end."""
