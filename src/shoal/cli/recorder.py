"""What a server that records itself is made of (`--trace`)."""

from __future__ import annotations

import asyncio
from functools import partial

from shoal.base.backend import BackendFacts
from shoal.base.ids import PeerId
from shoal.cli.joining import wall_clock
from shoal.cli.tracing import TraceChoice
from shoal.server.config import ServerConfig
from shoal.server.recording import RecordedServer, began
from shoal.server.server import Server, ServerMaker
from shoal.server.trace_file import TraceWriter


def server_maker(
    trace: TraceChoice | None, peer: PeerId, facts: BackendFacts, config: ServerConfig
) -> ServerMaker:
    """What makes the server: one that records itself if that is wanted.

    Raises:
        ConfigError: the trace can't be written.
    """
    if trace is None:
        return Server
    clock = asyncio.get_running_loop().time
    first = began(peer, facts, config, wall_clock())
    writer = TraceWriter(trace.path, first, clock, limit_bytes=trace.limit_bytes)
    return partial(RecordedServer, recorder=writer)
