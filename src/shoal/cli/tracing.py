"""`--trace` and `--trace-limit`; `recorder.py` makes something of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from shoal.base.errors import ConfigError
from shoal.cli.sizes import parse_size
from shoal.server.trace_file import TRACE_BYTES_MIN

TRACE_LIMIT: Final = "64MiB"

TraceOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Record what happens to sessions (who, when, how many; never contents or "
        "addresses), for `shoal simulate replay`. Goes on in a FILE that is there.",
    ),
]
TraceLimitOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE", help="Size of the trace; the older half of it becomes FILE.1 and goes."
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceChoice:
    """Where a server records itself, and how much."""

    path: Path
    limit_bytes: int


def parse_trace(path: Path | None, limit: str) -> TraceChoice | None:
    """The options, checked; None: no trace.

    Raises:
        ConfigError: no such folder, or no size.
    """
    limit_bytes = parse_size(limit, "--trace-limit")
    if limit_bytes < TRACE_BYTES_MIN:
        raise ConfigError(f"--trace-limit {limit}: at least {TRACE_BYTES_MIN >> 10}KiB")
    if path is None:
        return None
    if not path.parent.is_dir():
        raise ConfigError(f"--trace {path}: there is no folder {path.parent}")
    return TraceChoice(path=path, limit_bytes=limit_bytes)
