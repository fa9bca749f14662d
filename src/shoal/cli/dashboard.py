"""`shoal dashboard`: the swarm on a page."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.interrupts import noticing_interrupts
from shoal.cli.joining import SwarmChoice
from shoal.cli.options import InviteOption, JoinOption, LanOption, SwarmOption

LISTEN: Final = "127.0.0.1:8001"

ListenOption = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Where to answer; port 0 takes one that is free.")
]
OpenOption = Annotated[
    bool,
    typer.Option(
        "--open", help="Show it to everybody who can reach an address beyond this machine."
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
    app.command("dashboard")(dashboard)


def dashboard(
    join: JoinOption = None,
    lan: LanOption = False,
    listen: ListenOption = LISTEN,
    is_open: OpenOption = False,
    tls_certificate: CertificateOption = None,
    tls_key: KeyOption = None,
    swarm: SwarmOption = None,
    invite: InviteOption = None,
) -> None:
    """Show a swarm on a page: who serves which blocks, how fast, how full, what happened.

    The page is at http://HOST:PORT/swarm and its JSON at /swarm.json. It is live, and looks
    seldom while nobody watches. A gateway has the same page. One line on stdout says when it
    answers; Ctrl-C ends it.

    \b
    Examples:
      shoal dashboard --join ADDR
      shoal dashboard --lan --listen 127.0.0.1:9000
      curl http://127.0.0.1:8001/swarm.json
    """
    choice = SwarmChoice.to_visit(join, swarm, invite, lan)
    if (tls_certificate is None) != (tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key: give both or neither")
    with noticing_interrupts(signal.SIGINT, signal.SIGTERM):
        from shoal.cli.dashboard_host import show_until_stopped
        from shoal.cli.gateway_web import is_loopback
        from shoal.gateway.listening import Listening, parse_listen

        host, port = parse_listen(listen)
    if not is_open and not is_loopback(host):
        raise ConfigError(f"--listen {host}: others could see the swarm; add --open if they may")
    listening = Listening(host=host, port=port, certificate=tls_certificate, key=tls_key)
    asyncio.run(show_until_stopped(choice, listening))
