"""Files of `shoal ring run`: prompts in, tokens by time out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.base.errors import ConfigError


def read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """The prompts that the two options name.

    Raises:
        ConfigError: none at all, an empty one, or a file that can't be read as UTF-8.
    """
    prompts = list(given or ())
    if file is not None:
        try:
            text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"can't read prompts from {file}: {error}") from error
        found = paragraphs(text)
        if not found:
            raise ConfigError(f"{file} has no prompts: write paragraphs with blank lines between")
        prompts += found
    if not prompts:
        raise ConfigError("no prompts: give --prompt TEXT or --prompts-file F")
    if not all(prompts):
        raise ConfigError("a prompt is empty; give at least one character")
    return prompts


def paragraphs(text: str) -> list[str]:
    """Blocks of lines between blank lines, without the line breaks around them."""
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return ["\n".join(lines) for lines in found if lines]


def taken_in_turn(prompts: Sequence[str], samples: int | None) -> list[str]:
    """So many prompts, one after the other and again from the first."""
    count = len(prompts) if samples is None else samples
    return [prompts[number % len(prompts)] for number in range(count)]


def check_writable(*paths: Path | None) -> None:
    """See before the work that files can be written after it.

    Raises:
        ConfigError: one can't.
    """
    for path in paths:
        if path is None:
            continue
        try:
            with path.open("ab"):
                pass
        except OSError as error:
            raise ConfigError(f"can't write to {path}: {error}") from error


def write_csv(path: Path, at_s: Sequence[float]) -> None:
    """SECONDS,TOKENS for each token: the two columns that MDI-LLM writes, without a header."""
    lines = [f"{seconds:.6f},{count}\n" for count, seconds in enumerate(at_s, start=1)]
    path.write_text("".join(lines), encoding="ascii")


def draw_tokens(path: Path, at_s: Sequence[float], title: str) -> None:
    """Tokens over time as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure_class = require_matplotlib()
    figure = figure_class(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.step([0.0, *at_s], range(len(at_s) + 1), where="post")
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens, all samples")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    figure.savefig(path, dpi=120, format="png")


def require_matplotlib() -> type:
    """matplotlib's figures.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'shoal[draw]'") from error
    return Figure
