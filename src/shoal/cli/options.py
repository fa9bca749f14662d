"""Options that several commands share, with their texts."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_SWARM = "default"
"""The open swarm that servers and clients are in unless told otherwise."""


def _known_models(incomplete: str) -> list[str]:
    """For the shell's completion; what is no known name is completed as a path."""
    from shoal.model.known import KNOWN_MODELS

    return [name for name in sorted(KNOWN_MODELS) if name.startswith(incomplete)]


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=_known_models,
        help="A directory with config.json and *.safetensors, a .gguf file, a known name (see: "
        "shoal model list), or ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub, fetched "
        "unless it is in the cache.",
    ),
]
OptionalModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=_known_models,
        help="A directory with config.json and *.safetensors, a .gguf file, a known name (see: "
        "shoal model list), or ORG/NAME or ORG/NAME@REVISION of the Hugging Face hub, fetched "
        "unless it is in the cache. With --resume: that of FILE, unless it is elsewhere now.",
    ),
]
JoinOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ADDR",
        help="Address of any server of the swarm, as its ready line prints it; repeat for more.",
    ),
]
LanOption = Annotated[
    bool,
    typer.Option(
        "--lan",
        help="Find the swarm's servers in the local network (multicast DNS), with or without "
        "--join.",
    ),
]
SwarmOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The open swarm's name (default: default).")
]
InviteOption = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Invite into a private swarm (see: shoal swarm new)."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Compute threads (default: physical cores, or 1 if that is unknown)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]
FromPeersOption = Annotated[
    bool,
    typer.Option(
        "--weights-from-peers",
        help="Fetch what is needed of the model from the swarm, each tensor checked against its "
        "hash. MODEL is then the model's hash (see: shoal status), its beginning, or a known "
        "name.",
    ),
]
CacheLimitOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="How large the store of fetched weights may get; what was not used for longest "
        "goes first.",
    ),
]
