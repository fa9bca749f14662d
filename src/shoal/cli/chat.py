"""`shoal chat`: talk with a model that a swarm runs."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.adapters import AdapterOption, check_adapter
from shoal.cli.generate import (
    PATIENCE_S,
    CompressOption,
    DtypeOption,
    PatienceOption,
    StandbyOption,
    ThinOption,
    check_thin,
)
from shoal.cli.interrupts import noticing_interrupts
from shoal.cli.joining import SwarmChoice
from shoal.cli.options import (
    CacheLimitOption,
    FromPeersOption,
    InviteOption,
    JoinOption,
    LanOption,
    ModelArgument,
    SwarmOption,
    ThreadsOption,
)
from shoal.cli.sizes import parse_size
from shoal.cli.threads import set_threads
from shoal.cli.transcript import ChatSettings, Transcript, load_transcript
from shoal.cli.waiting import WaitingLine

MAX_NEW_TOKENS: Final = 512
TEMPERATURE: Final = 0.7
TOP_P: Final = 0.9

TEMPLATE_BYTES_MAX: Final = 1 << 20
"""The longest templates known have some 20 kB."""

SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="What the model is told first.")
]
LoadOption = Annotated[
    Path | None, typer.Option("--load", metavar="FILE", help="Go on with a chat of /save.")
]
MaxNewTokensOption = Annotated[
    int, typer.Option(metavar="N", min=1, help="An answer ends after this many tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option(metavar="T", min=0.0, help="0 always takes the likeliest token (greedy).")
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        metavar="P", help="Only the likeliest tokens that together have this probability."
    ),
]
TopKOption = Annotated[
    int | None, typer.Option(metavar="K", min=1, help="Only the K likeliest tokens.")
]
SeedOption = Annotated[
    int | None,
    typer.Option(metavar="S", help="Repeats sampled answers (default: new ones each time)."),
]
TemplateOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A chat template (Jinja) in place of the model's own."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(
    model: ModelArgument,
    join: JoinOption = None,
    lan: LanOption = False,
    system: SystemOption = None,
    load: LoadOption = None,
    max_new_tokens: MaxNewTokensOption = MAX_NEW_TOKENS,
    temperature: TemperatureOption = TEMPERATURE,
    top_p: TopPOption = TOP_P,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    template: TemplateOption = None,
    dtype: DtypeOption = None,
    compress: CompressOption = False,
    thin: ThinOption = False,
    adapter: AdapterOption = None,
    threads: ThreadsOption = None,
    patience: PatienceOption = PATIENCE_S,
    standby: StandbyOption = 0,
    weights_from_peers: FromPeersOption = False,
    cache_limit: CacheLimitOption = "50GB",
    swarm: SwarmOption = None,
    invite: InviteOption = None,
) -> None:
    """Talk with a model; the servers keep what was said, so each turn sends only new text.

    Type a message and press Enter; a line that ends with a backslash goes on in the next
    one. /help lists the commands: /reset, /undo, /retry, /system, /save, /load, /set,
    /chain, /quit. Ctrl-C stops an answer; a second Ctrl-C, or Ctrl-D, leaves. If a server
    fails, another one takes over and the answer goes on; where there is none, a line says what
    is waited for, until --patience is over.

    Answers go to stdout, everything else to stderr. Without a terminal each line of stdin is
    a message or a command, and the first failure ends it.

    \b
    Examples:
      shoal chat smollm2-135m-instruct --join ADDR
      shoal chat smollm2-135m-instruct --join ADDR --system "Answer in one sentence."
      echo "Why is the sea salty?" | shoal chat smollm2-135m-instruct --join ADDR
    """
    set_threads(threads)
    choice = SwarmChoice.to_visit(join, swarm, invite, lan)
    settings = ChatSettings(
        temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_new_tokens=max_new_tokens
    )
    transcript = Transcript() if load is None else load_transcript(load)
    if system is not None:
        transcript = Transcript(system=system or None, turns=transcript.turns)
    written = None if template is None else read_template(template)
    limit_bytes = parse_size(cache_limit, "--cache-limit") if weights_from_peers else None
    with noticing_interrupts(signal.SIGINT):
        from shoal.cli.chat_host import ChatTarget, fetch_model, hosting
        from shoal.cli.chat_room import ChatRoom
        from shoal.cli.models import open_model

        opened = open_model(model) if limit_bytes is None else None
    line = WaitingLine()
    target = ChatTarget(
        swarm=choice,
        model=opened or fetch_model(model, choice, limit_bytes or 0, is_thin=thin),
        template=written,
        dtype=dtype,
        is_compressed=compress,
        patience_s=patience,
        on_waiting=line.told,
        standby=check_thin(standby, is_thin=thin),
        is_thin=thin,
        adapter=check_adapter(adapter, is_thin=thin),
    )
    _quiet_warnings()
    with hosting(target) as (background, conversation):
        room = ChatRoom(background, conversation, transcript, settings)
        line.break_line = room.break_line
        line.is_wanted = lambda: conversation.is_answering
        room.greet(model)
        room.talk(is_terminal=sys.stdin.isatty())


def _quiet_warnings() -> None:
    """A chat tells of repairs and errors itself: no log lines amid an answer by default."""
    logger = logging.getLogger("shoal")
    if logger.level == logging.WARNING:
        logger.setLevel(logging.ERROR)


def read_template(path: Path) -> str:
    """The chat template in a file.

    Raises:
        ConfigError: it can't be read, or is larger than any template.
    """
    try:
        if path.stat().st_size > TEMPLATE_BYTES_MAX:
            raise ConfigError(f"--template {path}: larger than {TEMPLATE_BYTES_MAX} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the template {path}: {error}") from error
