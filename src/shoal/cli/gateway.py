"""`shoal gateway`: OpenAI's API before a swarm."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from shoal.base.errors import ConfigError
from shoal.cli.chat import TemplateOption, read_template
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

LISTEN: Final = "127.0.0.1:8000"

AT_ONCE: Final = 32
WAITING: Final = 128
WAIT_S: Final = 60.0

ListenOption = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Where to answer; port 0 takes one that is free.")
]
KeysOption = Annotated[
    Path | None,
    typer.Option("--api-keys", metavar="FILE", help="Who may ask, and how much (TOML, see below)."),
]
OpenOption = Annotated[
    bool,
    typer.Option(
        "--open",
        help="Let everybody in who can reach it, also beyond this machine or through a proxy.",
    ),
]
NameOption = Annotated[
    list[str] | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="The model's name in the API (default: MODEL); repeat for more.",
    ),
]
AtOnceOption = Annotated[
    int, typer.Option(metavar="N", min=1, max=1024, help="Answers at work; others wait.")
]
WaitingOption = Annotated[
    int, typer.Option(metavar="N", min=0, help="Requests that may wait; others get 503.")
]
WaitOption = Annotated[
    float, typer.Option(metavar="S", min=0.0, help="Who waited so long gets 503.")
]
KeepOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Positions of KV cache that ended answers may hold at the servers, so that the next "
        "turn begins there (default: a quarter of the smallest server's).",
    ),
]
ExactOption = Annotated[
    str,
    typer.Option(
        metavar="auto|always",
        help="Whether company may change the last bits of scores where keeping them costs "
        "several times the work (float32 on CPUs): with auto it may.",
    ),
]
DispatchOption = Annotated[
    str,
    typer.Option(
        metavar="each|chains",
        help="Who chooses servers: each answer for itself, or one dispatcher that puts each on "
        "the fastest chain with a free place and has the rest wait here.",
    ),
]
CertificateOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Answer HTTPS with this certificate (PEM).")
]
KeyOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The certificate's private key (PEM).")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("gateway")(gateway)


def gateway(
    model: ModelArgument,
    join: JoinOption = None,
    lan: LanOption = False,
    listen: ListenOption = LISTEN,
    api_keys: KeysOption = None,
    is_open: OpenOption = False,
    name: NameOption = None,
    at_once: AtOnceOption = AT_ONCE,
    waiting: WaitingOption = WAITING,
    wait: WaitOption = WAIT_S,
    keep: KeepOption = None,
    exact: ExactOption = "auto",
    dispatch: DispatchOption = "each",
    template: TemplateOption = None,
    tls_certificate: CertificateOption = None,
    tls_key: KeyOption = None,
    dtype: DtypeOption = None,
    compress: CompressOption = False,
    thin: ThinOption = False,
    threads: ThreadsOption = None,
    patience: PatienceOption = PATIENCE_S,
    standby: StandbyOption = 0,
    weights_from_peers: FromPeersOption = False,
    cache_limit: CacheLimitOption = "50GB",
    swarm: SwarmOption = None,
    invite: InviteOption = None,
) -> None:
    """Answer OpenAI's API with a swarm: chat, completions, tools, JSON schemas.

    Any program that takes a base URL works with http://HOST:PORT/v1. A chat page is at /, the
    swarm's servers are at /swarm, Prometheus reads /metrics. One line on stdout says when it
    answers. If a server fails, another one takes over and the answers go on. Ctrl-C ends it.

    Without --api-keys anybody may ask who reaches the address; beyond this machine that takes
    --open. A file of keys has a section per key:

    \b
      [alice]
      key = "at least 16 characters"     # or key_sha256 = "..."
      at_once = 4                        # limits are optional
      requests_per_minute = 60
      tokens_per_minute = 100000

    \b
    Examples:
      shoal gateway smollm2-135m-instruct --join ADDR
      shoal gateway smollm2-135m-instruct --join ADDR --listen 0.0.0.0:8000 --api-keys keys.toml
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
          -d '{"messages": [{"role": "user", "content": "Why is the sea salty?"}]}'
    """
    set_threads(threads)
    choice = SwarmChoice.to_visit(join, swarm, invite, lan)
    if (tls_certificate is None) != (tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key: give both or neither")
    limit_bytes = parse_size(cache_limit, "--cache-limit") if weights_from_peers else None
    written = None if template is None else read_template(template)
    with noticing_interrupts(signal.SIGINT, signal.SIGTERM):
        from shoal.cli.chat_host import fetch_model
        from shoal.cli.gateway_host import GatewaySettings, check_open, run_until_stopped
        from shoal.cli.models import open_model
        from shoal.gateway.keys import Keys, read_keys
        from shoal.gateway.line import LineConfig
        from shoal.gateway.listening import Listening, parse_listen

        host, port = parse_listen(listen)
        keys = Keys({}) if api_keys is None else read_keys(api_keys)
        is_open = is_open or not keys.is_open
        check_open(host, is_open=is_open)
        opened = open_model(model) if limit_bytes is None else None
    settings = GatewaySettings(
        swarm=choice,
        model=opened or fetch_model(model, choice, limit_bytes or 0, is_thin=thin),
        listening=Listening(host=host, port=port, certificate=tls_certificate, key=tls_key),
        keys=keys,
        is_open=is_open,
        names=tuple(name or [model]),
        line=LineConfig(places=at_once, waiting_max=waiting, wait_s=wait),
        kept_tokens=keep,
        exactness=_exactness(exact),
        template=written,
        dtype=dtype,
        is_compressed=compress,
        patience_s=patience,
        standby=check_thin(standby, is_thin=thin),
        is_thin=thin,
        dispatch=_dispatch(dispatch, is_thin=thin),
    )
    asyncio.run(run_until_stopped(settings))


def _dispatch(text: str, *, is_thin: bool) -> Literal["each", "chains"]:
    if text == "each":
        return "each"
    if text != "chains":
        raise ConfigError(f"--dispatch {text!r}: each or chains")
    if is_thin:
        raise ConfigError("--dispatch chains: with --thin the servers with heads choose chains")
    return "chains"


def _exactness(text: str) -> Literal["auto", "always"]:
    if text == "auto":
        return "auto"
    if text == "always":
        return "always"
    raise ConfigError(f"--exact {text!r}: auto or always")
