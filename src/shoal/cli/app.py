"""All commands in one app; errors become one line on stderr and an exit code.

Exit codes: 0 done; 1 it went wrong; 2 yours to fix (a flag, a file, an argument); 130
interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

import shoal
from shoal.base.errors import BadInput, ConfigError, ModelUnknown, ShoalError
from shoal.cli.logs import configure_logging
from shoal.cli.settings import default_map, find_file, global_settings, load_file

COMMANDS: Final = (
    "model",
    "serve",
    "generate",
    "chat",
    "finetune",
    "gateway",
    "dashboard",
    "status",
    "plan",
    "doctor",
    "bench",
    "ring",
    "swarm",
    "simulate",
    "study",
    "config",
)
"""Modules of this package with a `register(app)`, in the order of the help."""

INTERRUPTED: Final = 130
"""128 + SIGINT, as shells say it."""

YOURS: Final = (ConfigError, BadInput, ModelUnknown)
"""Errors that another command line would not have."""

_USAGE_ERROR: Final[type[Exception]] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""A wrong command line. By name, since some versions of typer bring their own click."""

_HELP = """Run large language models together on machines that are each too small.

Servers hold a part of a model's blocks each; a client finds a chain of them and streams
the answer. Try it on one machine:

\b
  shoal model get smollm2-135m-instruct
  shoal serve smollm2-135m-instruct                        (prints its address)
  shoal generate smollm2-135m-instruct --join ADDRESS --prompt "The sea is"

Environment: SHOAL_CACHE (where models are kept; default ~/.cache/shoal), SHOAL_LOG
(debug, info, warning or error; default warning), SHOAL_CONFIG (a TOML file with options;
default ./shoal.toml, then ~/.config/shoal/shoal.toml), and every option of a command as
SHOAL_COMMAND_OPTION. See: shoal config show --help.
"""


def make_app() -> typer.Typer:
    """The app with every command registered."""
    app = typer.Typer(
        name="shoal",
        help=_HELP,
        add_completion=True,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_options)
    for name in COMMANDS:
        importlib.import_module(f"shoal.cli.{name}").register(app)
    return app


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"shoal {shoal.__version__}")
        raise typer.Exit


def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Before the command: log everything, show tracebacks of errors."
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Before the command: a TOML file with options (see: shoal config show --help).",
        ),
    ] = None,
) -> None:
    path = find_file(config, os.environ, Path.cwd())
    file = None if path is None else load_file(path, context)
    log, cache = global_settings(file, os.environ)
    if cache.value is not None:
        os.environ["SHOAL_CACHE"] = str(Path(cache.value).expanduser())
    configure_logging("debug" if debug else log.value)
    arguments = context.obj if isinstance(context.obj, tuple) else ()
    context.default_map = default_map(context, file, os.environ, arguments)
    context.obj = file


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code.

    Raises:
        KeyboardInterrupt: as it is.
    """
    is_debugging = "--debug" in arguments[:3]  # before the command; --config FILE may be too
    try:
        command = typer.main.get_command(make_app())
        code = command.main(
            list(arguments), prog_name="shoal", standalone_mode=False, obj=tuple(arguments)
        )
    except typer.Abort:
        code = INTERRUPTED
    except _USAGE_ERROR as error:
        return _report_usage(error)
    except ShoalError as error:
        if is_debugging:
            traceback.print_exc()
        return _report(error)
    except BrokenPipeError:
        # Whoever read our output has enough. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001 - the top: a bug of ours, told in one line
        if is_debugging:
            traceback.print_exc()
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(f"error: {text} (a bug; see it whole: shoal --debug ...)", file=sys.stderr)
        return 1
    if code == INTERRUPTED:  # typer swallows the interrupt; some versions say Abort
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _report(error: ShoalError) -> int:
    text = " ".join((error.detail or type(error).__name__).split())
    if error.retry_after_s is not None:
        text += f" (try again in {error.retry_after_s:g} s)"
    print(f"error: {text}", file=sys.stderr)
    return 2 if isinstance(error, YOURS) else 1


def _report_usage(error: Exception) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        print(getattr(error, "message", ""), file=sys.stderr)
        return 2
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "shoal"
    print(f"error: {' '.join(message.split())} (see: {path} --help)", file=sys.stderr)
    return 2
