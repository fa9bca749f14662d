"""What `shoal dashboard` does: join, look, show."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from shoal.cli.gateway_web import LOOPBACK, is_loopback, until_stopped
from shoal.cli.joining import SwarmChoice, Visitor, visit, wall_clock
from shoal.cli.status import as_dicts, ask_all
from shoal.dashboard.app import application
from shoal.dashboard.observer import Look, observing
from shoal.gateway.listening import Listening, serving


def looking(visitor: Visitor) -> Look:
    """How a visitor looks at its swarm."""

    async def look() -> Sequence[dict[str, Any]]:
        return as_dicts(await ask_all(visitor))

    return look


async def show_until_stopped(choice: SwarmChoice, listening: Listening) -> None:
    """Show the swarm until SIGINT or SIGTERM.

    Raises:
        ConfigError: an address that can't be had.
        PeerUnreachable: none of the joins answers.
    """
    await until_stopped(_show(choice, listening))


async def _show(choice: SwarmChoice, listening: Listening) -> None:
    hosts = LOOPBACK if is_loopback(listening.host) else None
    async with (
        visit(choice) as visitor,
        observing(looking(visitor), wall_clock) as observer,
        serving(application(observer, hosts), listening) as url,
    ):
        print(f"ready url={url}/swarm", flush=True)
        await asyncio.Event().wait()
