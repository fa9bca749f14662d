"""What commands that answer HTTP share."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine
from ipaddress import ip_address
from typing import Any, Final

logger = logging.getLogger(__name__)

LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
"""Host names of this machine, as browsers say them."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the host."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in LOOPBACK


async def until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` until it ends, or SIGINT or SIGTERM cancels it."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        logger.info("stopped by a signal")
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
