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
    is_lan: bool = False
    """Look for servers in the local network."""

    @classmethod
    def parse(
        cls,
        joins: Sequence[str] | None,
        name: str | None,
        invite: str | None,
        is_lan: bool = False,
    ) -> SwarmChoice:
        """Check the options.

        Raises:
            ConfigError: malformed, or both a name and an invite.
        """
        if name is not None and invite is not None:
            raise ConfigError("--swarm and --invite: give one; an invite names its swarm itself")
        addresses = tuple(parse_address(text) for text in joins or ())
        return cls(joins=addresses, name=name, invite=invite, is_lan=is_lan)

    @classmethod
    def to_visit(
        cls,
        joins: Sequence[str] | None,
        name: str | None,
        invite: str | None,
        is_lan: bool = False,
    ) -> SwarmChoice:
        """Check the options of a command that needs a swarm.

        Raises:
            ConfigError: as `parse`, or there is nothing to find the swarm by.
        """
        choice = cls.parse(joins, name, invite, is_lan)
        choice.check_named()
        return choice

    def check_named(self) -> None:
        """See that there is something to find the swarm by.

        Raises:
            ConfigError: there is not.
        """
        if not self.joins and not self.is_lan:
            raise ConfigError(
                "no server named: add --join ADDR, an address from a ready line, or --lan to "
                "look for servers in the local network"
            )

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
        ConfigError: nothing is given to find the swarm by.
        PeerUnreachable: none of the joins answers, or nobody in the local network.
    """
    choice.check_named()
    identity = Identity.generate()
    swarm_pass = choice.pass_for(identity)
    transport = TcpTransport(identity)
    try:
        joins = await _find_joins(choice, swarm_pass.name)
        config = GossipConfig(swarm_pass=swarm_pass, joins=joins, is_reader=True)
        async with GossipDirectory(transport, config, random.SystemRandom()) as directory:
            yield Visitor(
                identity=identity,
                transport=transport,
                swarm_pass=swarm_pass,
                directory=directory,
            )
    finally:
        await transport.close()


async def _find_joins(choice: SwarmChoice, swarm: str) -> tuple[Address, ...]:
    """The joins that are given, and those found in the local network.

    Raises:
        PeerUnreachable: none is given and none is found.
    """
    if not choice.is_lan:
        return choice.joins
    from shoal.discovery.lan import find_on_lan, none_found

    joins = (*choice.joins, *await find_on_lan(swarm))
    if not joins:
        raise none_found(swarm)
    return joins


async def keep_on_lan(
    directory: GossipDirectory, listening: Address, hosts: tuple[str, ...], said: tuple[str, str]
) -> None:
    """Announce a server in the local network and meet the others there, until cancelled.

    `said` is (swarm, model).

    Raises:
        ConfigError: this machine can't send multicasts.
    """
    from shoal.discovery.lan import LanNotice, announced_on_lan, watch_lan

    notice = LanNotice(
        peer=listening.peer, hosts=hosts, port=listening.port, swarm=said[0], model=said[1]
    )
    async with announced_on_lan(notice):
        await watch_lan(said[0], directory.meet, hosts)
