"""`shoal swarm new`: a private swarm and the invite to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Make private swarms.", no_args_is_help=True, rich_markup_mode=None)
    group.callback()(_group)
    group.command("new")(new)
    app.add_typer(group, name="swarm")


def _group() -> None:
    """Make private swarms."""


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The swarm's name.")],
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the swarm's key goes (default: NAME.swarm-key)."),
    ] = None,
) -> None:
    """Make a private swarm; the last line on stdout is an invite to it.

    Whoever has the invite can join, as a server or as a client: treat it as a password.
    Whoever has the key file can invite others: keep it to yourself. Nobody else is let in.

    \b
    Example:
      shoal swarm new friends
      shoal serve MODEL --invite shoal-invite-1-...
      shoal generate MODEL --invite shoal-invite-1-... --join ADDR --prompt "Hello"
    """
    from shoal.net.membership import new_swarm

    swarm_key, invite = new_swarm(name)
    path = key or Path(re.sub(r"[^\w.-]+", "-", name) + ".swarm-key")
    swarm_key.save(path)
    print(f"key: {path}")
    print(invite, flush=True)
