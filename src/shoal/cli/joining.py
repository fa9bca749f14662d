"""How a command takes part in a swarm: identity, pass, transport, directory."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from shoal.base.errors import ConfigError
from shoal.cli.options import DEFAULT_SWARM
from shoal.discovery.gossip import GossipConfig, GossipDirectory
from shoal.net.address import Address, parse_address
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass, join_by_invite
from shoal.net.tcp import TcpTransport


def wall_clock() -> float:
    """Unix time in seconds; the library never asks for it by itself."""
    return time.time()  # noqa: TID251 - the command line is where clocks are handed in


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmChoice:
    """Which swarm a command is about, as the person gave it."""

    joins: tuple[Address, ...]
    name: str | None
    invite: str | None

    @classmethod
    def parse(cls, joins: Sequence[str], name: str | None, invite: str | None) -> SwarmChoice:
        """Check the options.

        Raises:
            ConfigError: malformed, or both a name and an invite.
        """
        if name is not None and invite is not None:
            raise ConfigError("--swarm and --invite: give one; an invite names its swarm itself")
        addresses = tuple(parse_address(text) for text in joins)
        return cls(joins=addresses, name=name, invite=invite)

    def pass_for(self, identity: Identity) -> SwarmPass:
        """The pass that lets `identity` in.

        Raises:
            ConfigError: the invite or the name is no good.
        """
        if self.invite is not None:
            return join_by_invite(self.invite, identity, clock=wall_clock)
        return SwarmPass.open(self.name or DEFAULT_SWARM)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """A process that looks at a swarm and serves nothing."""

    identity: Identity
    transport: TcpTransport
    swarm_pass: SwarmPass
    directory: GossipDirectory


@asynccontextmanager
async def visit(choice: SwarmChoice) -> AsyncIterator[Visitor]:
    """A visitor under a fresh identity, once it knows the swarm.

    Raises:
        ConfigError: no join is given.
        PeerUnreachable: none of the joins answers.
    """
    if not choice.joins:
        raise ConfigError("no server named: add --join ADDR, an address from a ready line")
    identity = Identity.generate()
    swarm_pass = choice.pass_for(identity)
    transport = TcpTransport(identity)
    config = GossipConfig(swarm_pass=swarm_pass, joins=choice.joins, is_reader=True)
    try:
        async with GossipDirectory(transport, config, random.SystemRandom()) as directory:
            yield Visitor(
                identity=identity,
                transport=transport,
                swarm_pass=swarm_pass,
                directory=directory,
            )
    finally:
        await transport.close()
