"""What must be true of a simulated swarm after every step, and when all is over."""

from __future__ import annotations

from typing import Final

from shoal.base.errors import InternalError
from shoal.base.ids import short
from shoal.client.client import Client
from shoal.lab.script import ScriptRunner
from shoal.lab.swarm import SimulatedServer, SimulatedSwarm
from shoal.server.config import ServerConfig
from shoal.server.session import HopSession
from shoal.wire.tensors import is_finite

ENTRIES_OVER: Final = 6
"""Entries by which a log may pass its bounds: four run at once, one more is under way on the
link, and one more waits."""


class BrokenInvariant(InternalError):
    """The system did something it must never do; the text says what."""


def check_step(swarm: SimulatedSwarm) -> None:
    """Lengths, pages and bytes agree at every server that is up, and logs keep their bounds."""
    for server in swarm.servers:
        if server.server is None:
            continue
        for hop in server.server.sessions:
            hop.check_integrity()
            _check_parked(hop)
            _check_log_bytes(hop, swarm.server_config)
        _check_pages(server)


def check_end(swarm: SimulatedSwarm, clients: list[Client]) -> None:
    """All sessions were closed a while ago: nothing may be left of them."""
    check_step(swarm)
    for server in swarm.servers:
        if server.server is None or server.backend is None:
            continue
        name = server.spec.name
        if len(server.server.sessions):
            raise BrokenInvariant(f"{name} still holds {len(server.server.sessions)} sessions")
        if server.backend.lengths:
            raise BrokenInvariant(f"{name}'s backend still holds {server.backend.lengths}")
        if server.server.num_links:
            raise BrokenInvariant(f"{name} still has {server.server.num_links} outgoing links")
    for client in clients:
        if client.num_sessions or client.num_links:
            raise BrokenInvariant(f"client {short(client.me)} still has sessions or links")


def check_contents(swarm: SimulatedSwarm, runner: ScriptRunner) -> None:
    """Every hop of the session holds exactly what one machine would have sent there."""
    session = runner.session
    if session is None:
        return
    for server in swarm.servers:
        if server.server is None:
            continue
        for hop in server.server.sessions.of_session(session.id):
            if hop.plan.epoch == session.epoch:
                _check_log(hop, runner, session.rev)


def _check_log(hop: HopSession, runner: ScriptRunner, rev: int) -> None:
    if hop.log.rev != rev:
        return  # a truncation that has not come this far
    expected = runner.reference.outputs_at(hop.plan.span.end)
    for entry in hop.log:
        if entry.end > len(expected):
            raise BrokenInvariant(f"{hop.plan.span} holds position {entry.end} of the future")
        right = b"".join(expected[entry.end - entry.num_rows : entry.end])
        rows = bytes(entry.data())
        if rows != right and is_finite(entry.encoding, rows):  # poison is for receivers to see
            raise BrokenInvariant(
                f"{hop.plan.span} holds wrong rows at {entry.position} (rev {rev})"
            )


def _check_parked(hop: HopSession) -> None:
    if hop.is_parked and (hop.queue or hop.inbound.have):
        raise BrokenInvariant(f"a parked hop over {hop.plan.span} holds rows")


def _check_log_bytes(hop: HopSession, config: ServerConfig) -> None:
    """A log passes its bound only by what its receiver had not worked off when it last grew.

    That is the receiver's window: a server's is the same everywhere here, a client's is wide.
    """
    limit = config.engine.log_bytes_per_session_max
    if hop.log.num_bytes <= limit:
        return
    largest = max(entry.payload_bytes for entry in hop.log)
    window_bytes = max(config.window_bytes, hop.outbound.window_bytes)
    margin = window_bytes + config.engine.run_ahead_bytes + ENTRIES_OVER * largest
    if hop.log.num_bytes > limit + margin:
        raise BrokenInvariant(
            f"the log of {hop.plan.span} has {hop.log.num_bytes} bytes with a bound of {limit} "
            f"and {margin} that may be under way"
        )


def _check_pages(server: SimulatedServer) -> None:
    if server.server is None or server.backend is None:
        return
    sessions = server.server.sessions
    ledger = sessions.ledger
    held = 0
    for hop in sessions:
        pages = ledger.held(hop.sequence)
        held += pages
        if pages < ledger.pages(hop.settled_length) and not hop.is_parked:
            raise BrokenInvariant(
                f"{server.spec.name}: {hop.plan.span} uses {hop.settled_length} positions "
                f"but holds {pages} pages"
            )
    if held != ledger.used:
        raise BrokenInvariant(f"{server.spec.name}: pages leaked")
