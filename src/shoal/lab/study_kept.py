"""What studies left in a folder: read again for the verdict on all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.base.errors import ConfigError
from shoal.lab.study import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """When a study was run, and by which code."""

    date: str = ""
    """As 2026-11-21."""
    commit: str = ""
    """Short, with `+` where files were changed since; empty: not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Of one run of a study, what a verdict needs."""

    checks: tuple[Check, ...]
    seeds: int
    is_quick: bool
    made: Made


def load_kept(folder: Path, names: Iterable[str]) -> dict[str, Kept]:
    """The runs of these studies that lie in `folder`, by name; those that are not are left out.

    Raises:
        ConfigError: there is none at all, or a file is not one that a study wrote.
    """
    names = list(names)
    paths = {name: folder / f"{name}.json" for name in names}
    found = {name: _load(path) for name, path in paths.items() if path.is_file()}
    if not found:
        raise ConfigError(
            f"{folder} holds no results of studies, {names[0]}.json and so on: run some with "
            f"--out {folder}"
        )
    return found


def _load(path: Path) -> Kept:
    try:
        return _kept(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not what a study wrote ({type(error).__name__}: {error}): run it again"
        ) from error


def _kept(content: Mapping[str, Any]) -> Kept:
    environment = content["environment"]
    return Kept(
        checks=tuple(
            Check(name=str(one["expected"]), found=str(one["found"]), holds=one["holds"] is True)
            for one in content["checks"]
        ),
        seeds=len(content["seeds"]),
        is_quick=content["quick"] is True,
        # Results from before these were told have neither.
        made=Made(date=str(environment.get("date", "")), commit=str(environment.get("commit", ""))),
    )
