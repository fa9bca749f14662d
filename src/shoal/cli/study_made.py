"""When a study was run, and of which commit."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import shoal
from shoal.cli.joining import wall_clock
from shoal.lab.study_kept import Made

GIT_TIMEOUT_S: Final = 10.0
"""Git answers these questions in milliseconds, unless its disk is away."""


def made_now() -> Made:
    """Today's date (UTC) and the commit of the code that runs.

    A package that was installed from a wheel has no commit; one with changes that are not
    committed is told by `+`.
    """
    today = datetime.fromtimestamp(wall_clock(), UTC).date().isoformat()
    return Made(date=today, commit=commit_of(Path(shoal.__file__).parent))


def commit_of(package: Path) -> str:
    """The commit of a package in a checkout's `src`, with `+` where it was changed since.

    Empty: it is in no checkout of its own, or there is no git.
    """
    top = _git(package, "rev-parse", "--show-toplevel")
    # Not the commit of whatever project has a virtual environment in its folder.
    if not top or Path(top, "src", package.name).resolve() != package.resolve():
        return ""
    commit = _git(package, "rev-parse", "--short", "HEAD")
    return f"{commit}+" if commit and _git(package, "status", "--porcelain", "--", ".") else commit


def _git(folder: Path, *words: str) -> str:
    """What git says; empty where it is not, or has nothing to say."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
