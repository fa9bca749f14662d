"""`shoal config`: what applies when the command line says nothing, and where it comes from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.base.errors import ConfigError
from shoal.cli.options import JsonOption
from shoal.cli.settings import (
    SECRET,
    ConfigFile,
    Setting,
    as_toml,
    global_settings,
    leaves,
    resolve,
    search_path,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="See which options apply, and why.", no_args_is_help=True, rich_markup_mode=None
    )
    group.callback()(_group)
    group.command("show")(show)
    app.add_typer(group, name="config")


def _group() -> None:
    """See which options apply, and why."""


def show(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="COMMAND",
            show_default=False,
            help="Only this command, for example: chat, or: model inspect.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the options of every command and where each value comes from.

    A flag beats an environment variable (SHOAL_CHAT_TEMPERATURE), which beats the config
    file, which beats the default. The file is the one of --config, of SHOAL_CONFIG,
    ./shoal.toml, or shoal/shoal.toml in the user's config folder (~/.config): the first
    one there is. What is printed is such a file; invites are hidden. See
    docs/configuration.md.

    \b
    Examples:
      shoal config show
      shoal config show chat
      shoal --config home.toml config show serve --json
    """
    file = context.obj if isinstance(context.obj, ConfigFile) else None
    root = context.find_root().command
    wanted = tuple(command or ())
    found = {
        words: resolve(words, leaf, file, os.environ, context.find_root())
        for words, leaf in leaves(root)
        if words[: len(wanted)] == wanted
    }
    if not found:
        known = ", ".join(" ".join(words) for words, _ in leaves(root))
        raise ConfigError(f"no command {' '.join(wanted)!r}; there are: {known}")
    if as_json:
        print(json.dumps(_as_dict(file, found)), flush=True)
    else:
        print("\n".join(_lines(file, found)), flush=True)


def _as_dict(
    file: ConfigFile | None, found: dict[tuple[str, ...], list[Setting]]
) -> dict[str, Any]:
    return {
        "file": None if file is None else str(file.path),
        "global": _values(global_settings(file, os.environ)),
        "commands": {" ".join(words): _values(settings) for words, settings in found.items()},
    }


def _values(settings: list[Setting]) -> dict[str, Any]:
    return {one.name: {"value": _shown(one), "source": one.source} for one in settings}


def _lines(file: ConfigFile | None, found: dict[tuple[str, ...], list[Setting]]) -> list[str]:
    if file is None:
        places = ", ".join(str(path) for path in search_path(os.environ, Path.cwd()))
        lines = [f"# no config file (looked for {places})"]
    else:
        lines = [f"# config file: {file.path}"]
    lines += [_line(setting) for setting in global_settings(file, os.environ)]
    for words, settings in found.items():
        lines += ["", f"[{'.'.join(words)}]"]
        lines += [_line(setting) for setting in settings]
    return lines


def _line(setting: Setting) -> str:
    value = _shown(setting)
    if value is None:
        return f"# {setting.name} is not set"
    text = f"{setting.name} = {as_toml(value)}"
    return text if setting.source == "default" else f"{text:<40}  # {setting.source}"


def _shown(setting: Setting) -> Any:
    if setting.value is None:
        return None
    if setting.name in SECRET:
        return "(hidden)"
    value = setting.value
    return value if isinstance(value, bool | int | float | list | tuple) else str(value)
