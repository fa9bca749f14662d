"""ring.json: how commands on the starter's machine find the ring that is up there."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from shoal.base.errors import ConfigError
from shoal.cli.joining import SwarmChoice
from shoal.cli.models import cache_dir

RingOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The file that `shoal ring up` wrote (default: ring.json in the cache folder).",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class RingFile:
    """A ring that is up."""

    address: str
    """Of the starter, as nodes dial it."""
    invite: str | None
    swarm: str | None
    """The open swarm's name; None: there is an invite."""
    given: str
    """The model as the person at the starter named it."""
    model: str
    """Its hash."""

    def choice(self) -> SwarmChoice:
        """How to join the ring's swarm."""
        return SwarmChoice.parse([self.address], self.swarm, self.invite)


def ring_path(path: Path | None) -> Path:
    """Where the file is."""
    return cache_dir() / "ring.json" if path is None else path


def find_ring(path: Path | None) -> RingFile:
    """The ring that is up on this machine.

    Raises:
        ConfigError: none is, or the file is no such file.
    """
    where = ring_path(path)
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
        return RingFile(**content)
    except FileNotFoundError:
        raise ConfigError(
            f"no ring is up on this machine ({where} is missing): start one with shoal ring up, "
            "or name its file with --ring"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{where} is no file of shoal ring up: {error}") from error


@contextmanager
def written(ring: RingFile, path: Path) -> Iterator[None]:
    """The file is there while the context is open; only its owner may read it.

    Raises:
        ConfigError: it can't be written.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    text = json.dumps(asdict(ring))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"can't write {path}: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # another ring may have put its own there
            if path.read_text(encoding="utf-8") == text:
                path.unlink()
