"""Loading blocks for a server: in a thread, with a progress bar, stopped when nobody waits."""

from __future__ import annotations

import asyncio

from shoal.base.backend import BlockBackend
from shoal.base.errors import ShoalError
from shoal.base.spans import Span
from shoal.cli.logs import progress_bar
from shoal.model.source import ModelSource
from shoal.model.torch_backend import BackendConfig, load_backend


class _LoadStopped(ShoalError):
    """Nobody waits for the model any more."""


async def load_blocks(
    source: ModelSource, span: Span, config: BackendConfig, *, beside: BlockBackend | None = None
) -> BlockBackend:
    """Load in a thread, so that the server can be asked and stopped meanwhile.

    `beside`: what serves now, with the same source and config; blocks that it has are shared.

    Raises:
        ConfigError, ModelError: as `load_backend`.
    """
    is_stopped = False
    with progress_bar() as show:

        def progress(what: str, done: int, total: int) -> None:
            if is_stopped:
                raise _LoadStopped("loading was stopped")
            show(what, done, total)

        try:
            return await asyncio.to_thread(load_backend, source, span, config, progress, beside)
        finally:
            is_stopped = True
