"""Logging and progress of the command line: on stderr, so that stdout stays for results."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shoal.base.errors import ConfigError

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure_logging(level: str) -> None:
    """Log to stderr from this level on.

    Raises:
        ConfigError: no such level.
    """
    number = LEVELS.get(level.lower())
    if number is None:
        raise ConfigError(f"SHOAL_LOG is {level!r}; use one of {', '.join(LEVELS)}")
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    logging.getLogger("shoal").setLevel(number)


Progress = Callable[[str, int, int], None]
"""Told (what is being done, done, total), in whatever unit the work has."""


@contextmanager
def progress_bar(*, is_bytes: bool = False) -> Iterator[Progress]:
    """A bar on stderr while something takes its time; nothing if stderr is no terminal.

    It is drawn when it is first told of something: who finds all there already shows no bar.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich import progress
    from rich.console import Console

    amount = progress.DownloadColumn() if is_bytes else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), amount)
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=None)

    def show(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total)
        bar.start()  # does nothing from the second time on

    try:
        yield show
    finally:
        if bar.live.is_started:
            bar.stop()
