"""`shoal status --watch`: a table that follows the swarm, or lines where no terminal is."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shoal.cli.joining import SwarmChoice, visit, wall_clock
from shoal.cli.status import as_dicts, ask_all, renderables

Models = Sequence[dict[str, Any]]
Show = Callable[[Models, float], None]
"""Told what was seen, and when (Unix time)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """What to watch, and how."""

    swarm: SwarmChoice
    interval_s: float
    count: int | None
    """Looks; None: until stopped."""
    is_json: bool


def watch_until_stopped(settings: WatchSettings) -> None:
    """Look again and again until q, Ctrl-C or the last look.

    Raises:
        PeerUnreachable: none of the joins answers.
    """
    from rich.console import Console

    has_keys = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console()
    try:
        # A terminal that can't move its cursor gets lines, like a pipe.
        if console.is_terminal and not console.is_dumb_terminal and not settings.is_json:
            with _live_table(console, settings.interval_s) as show:
                asyncio.run(_watch(settings, show, has_keys=has_keys))
        else:
            show = _print_json if settings.is_json else _print_lines
            asyncio.run(_watch(settings, show, has_keys=has_keys))
    except KeyboardInterrupt:
        pass  # how watching ends


async def _watch(settings: WatchSettings, show: Show, *, has_keys: bool) -> None:
    stopping = asyncio.Event()
    with _keys(stopping) if has_keys else _no_keys():
        async with visit(settings.swarm) as visitor:
            looks = 0
            while not stopping.is_set():
                show(as_dicts(await ask_all(visitor)), wall_clock())
                looks += 1
                if looks == settings.count:
                    return
                try:
                    await asyncio.wait_for(stopping.wait(), settings.interval_s)
                except TimeoutError:
                    pass


@contextmanager
def _keys(stopping: asyncio.Event) -> Iterator[None]:
    """Sets `stopping` at q; keys come at once and are not shown."""
    import termios
    import tty

    loop, stdin = asyncio.get_running_loop(), sys.stdin.fileno()

    def pressed() -> None:
        if sys.stdin.read(1).lower() in ("q", ""):
            stopping.set()

    before = termios.tcgetattr(stdin)
    tty.setcbreak(stdin)
    loop.add_reader(stdin, pressed)
    try:
        yield
    finally:
        loop.remove_reader(stdin)
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


@contextmanager
def _no_keys() -> Iterator[None]:
    yield


@contextmanager
def _live_table(console: Any, interval_s: float) -> Iterator[Show]:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(Text("looking ..."), console=console, screen=True, auto_refresh=False) as live:

        def show(models: Models, at_s: float) -> None:
            foot = Text(f"{clock_text(at_s)}, every {interval_s:g} s; q leaves", style="dim")
            live.update(Group(*renderables(models), foot), refresh=True)

        yield show


def _print_json(models: Models, at_s: float) -> None:
    print(json.dumps({"at_s": round(at_s, 3), "models": models}), flush=True)


def _print_lines(models: Models, at_s: float) -> None:
    for line in lines(models):
        print(f"{clock_text(at_s)} {line}", flush=True)


def clock_text(at_s: float) -> str:
    """The time of day here."""
    return datetime.fromtimestamp(at_s).strftime("%H:%M:%S")


def lines(models: Models) -> list[str]:
    """One line per model, each with the same words in the same order."""
    return [_line(model) for model in models] or ["no servers"]


def _line(model: dict[str, Any]) -> str:
    answering = [server for server in model["servers"] if not server["error"]]
    missing = sum(end - start for start, end in model["missing"])
    names = ("sessions", "queued_tokens", "free_tokens", "cache_tokens")
    sums = {name: sum(server[name] or 0 for server in answering) for name in names}
    return (
        f"model {model['model'][:12]} blocks {model['num_blocks'] - missing} of "
        f"{model['num_blocks']} servers {len(answering)} of {len(model['servers'])} "
        f"sessions {sums['sessions']} queued {sums['queued_tokens']} "
        f"cache free {sums['free_tokens']} of {sums['cache_tokens']}"
    )
