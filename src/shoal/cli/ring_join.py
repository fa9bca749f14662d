"""What `shoal ring join` does: offer this machine to a starter, and do as it says."""

from __future__ import annotations

import asyncio
import logging
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import ConfigError, PeerBusy, PeerTimeout, PeerUnreachable
from shoal.base.ids import peer_text
from shoal.base.spans import Span
from shoal.cli.joining import SwarmChoice
from shoal.cli.models import OpenModel, quiet_transformers
from shoal.cli.peer_weights import Swarm, open_from
from shoal.cli.ring_footing import listen_near, stand
from shoal.cli.ring_host import Footing, HostSettings, RingHost
from shoal.client.weight_sources import Place
from shoal.discovery.directory import Snapshot
from shoal.net.address import Address
from shoal.net.channel import PURPOSE_RING, Channel, open_channel
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.tasks import first_failure
from shoal.net.tcp import TcpTransport
from shoal.server.ring_node import RingMember
from shoal.wire.ring import RingModel

logger = logging.getLogger(__name__)

LOOK_S: Final = 1.0
"""Between two tries to reach a starter."""

WEIGHTS_BYTES_PER_S: Final = 32 << 20
"""At which a node hands on what it fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinSettings:
    """What `shoal ring join` was asked to do."""

    swarm: SwarmChoice
    """Its joins are the starter's addresses."""
    name: str | None
    listen: str | None
    announce: str | None
    host: HostSettings
    cache_limit_bytes: int
    patience_s: float
    """How long to look for a starter at the beginning."""
    is_once: bool
    """Leave when the ring ends, instead of waiting for the next."""
    drain_s: float
    """When stopped: how long samples may take to move to others; 0: leave at once."""


@dataclass(frozen=True, slots=True)
class RingSwarm(Swarm):
    """The peers of a ring: whoever has blocks, and the starter, which has all."""

    starter: Place

    def places(self, model: str, span: Span | None = None) -> list[Place]:
        """Nodes first, those with blocks of `span` before others; the starter last."""
        others = [one for one in Swarm.places(self, model, span) if one.peer != self.starter.peer]
        return [*others, self.starter]


async def join_until_over(settings: JoinSettings, stop: asyncio.Event) -> None:
    """Join, and join again when a ring is over, until stopped (or once).

    `stop`: set to leave in good order; cancel it to leave at once.

    Raises:
        ShoalError: no starter answers in time, it refuses us, or this machine can't help.
    """
    leaving = Leaving(stop, settings.drain_s)
    await first_failure(_join_again(settings, leaving), leaving.run())


class Leaving:
    """What happens when a node is told to stop: nothing where no samples run."""

    def __init__(self, stop: asyncio.Event, drain_s: float) -> None:
        self._stop = stop
        self._drain_s = drain_s
        self._here: tuple[RingMember, RingHost] | None = None

    @contextmanager
    def member(self, member: RingMember, host: RingHost) -> Iterator[None]:
        """This one is to leave in good order, while the context lasts."""
        self._here = member, host
        try:
            yield
        finally:
            self._here = None

    async def run(self) -> None:
        """Until nothing holds us any more."""
        await self._stop.wait()
        if self._here is None or not self._drain_s:
            return
        member, host = self._here
        if host.num_sessions:
            text = f"leaving: others take its blocks, within {self._drain_s:.0f} s"
            print(f"{text}; Ctrl-C again leaves at once", file=sys.stderr, flush=True)
            await member.leave(self._drain_s)


async def _join_again(settings: JoinSettings, leaving: Leaving) -> None:
    patience_s: float | None = settings.patience_s
    is_told = False
    while True:
        starter = await _find_starter(settings, patience_s)
        patience_s = None
        try:
            reason = await _one_ring(settings, starter, leaving)
        except (PeerUnreachable, PeerTimeout) as error:
            if settings.is_once:
                raise
            reason = error.detail
        except PeerBusy as error:  # the ring is full, or about to end
            if settings.is_once:
                raise
            if not is_told:
                print(f"{error.detail}; asking again, Ctrl-C leaves", file=sys.stderr, flush=True)
            is_told = True
            await asyncio.sleep(LOOK_S)
            continue
        is_told = False
        print(f"the ring is over: {reason}", file=sys.stderr, flush=True)
        if settings.is_once:
            return
        print("waiting for the next ring; Ctrl-C leaves", file=sys.stderr, flush=True)


async def _find_starter(settings: JoinSettings, patience_s: float | None) -> tuple[Address, ...]:
    """Where a starter answers now."""
    loop = asyncio.get_running_loop()
    since_s, is_told = loop.time(), False
    while True:
        identity = Identity.generate()
        transport = TcpTransport(identity)
        try:
            return await _answering(settings, transport, settings.swarm.pass_for(identity))
        except (PeerUnreachable, PeerTimeout, PeerBusy) as error:
            if patience_s is not None and loop.time() - since_s >= patience_s:
                raise
            if not is_told:
                print(f"waiting for the starter: {error.detail}", file=sys.stderr, flush=True)
            is_told = True
            await asyncio.sleep(LOOK_S)
        finally:
            await transport.close()


async def _answering(
    settings: JoinSettings, transport: TcpTransport, swarm_pass: SwarmPass
) -> tuple[Address, ...]:
    addresses = settings.swarm.joins
    if settings.swarm.is_lan:
        from shoal.discovery.lan import find_on_lan

        addresses = (*addresses, *await find_on_lan(swarm_pass.name))
        if not addresses:
            raise PeerUnreachable(
                f"no starter of {swarm_pass.name!r} answers in the local network: start one "
                "with shoal ring up --lan, allow UDP port 5353, or name it by --starter"
            )
    (await _dial(addresses, transport, swarm_pass)).close()
    return addresses


async def _dial(
    addresses: Sequence[Address], transport: TcpTransport, swarm_pass: SwarmPass
) -> Channel:
    """A ring stream at the first address that answers."""
    error: Exception = ConfigError("no starter named: give --starter ADDR, or --lan")
    for address in addresses:
        try:
            return await open_channel(transport, address, PURPOSE_RING, swarm_pass)
        except (PeerUnreachable, PeerTimeout) as failure:
            error = failure
    raise error


async def _one_ring(
    settings: JoinSettings, addresses: tuple[Address, ...], leaving: Leaving
) -> str:
    """Take part in one ring until it ends; why it ended."""
    identity = Identity.generate()
    swarm_pass = settings.swarm.pass_for(identity)
    async with AsyncExitStack() as stack:
        transport = TcpTransport(identity)
        stack.push_async_callback(transport.close)
        base = await stack.enter_async_context(AsyncExitStack())  # outlives the host
        starter = Place(addresses[0].peer, addresses)
        name = settings.name or platform.node()

        def peers(footing: Footing) -> Swarm:
            return RingSwarm(transport, swarm_pass, footing.directory.snapshot, starter)

        async def get_model(ring: RingModel) -> tuple[OpenModel, Footing]:
            print(f"joined peer={peer_text(identity.peer)} name={name}", flush=True)
            quiet_transformers()
            nobody = Swarm(transport, swarm_pass, _nobody)
            model = await open_from(ring.model.hex(), nobody, [starter], settings.cache_limit_bytes)
            footing = await stand(
                base, identity, swarm_pass, transport,
                model=model,
                ring=ring,
                listen=listen_near(settings.listen, addresses[0].host),
                announce=settings.announce,
                joins=addresses,
                weights_bytes_per_s=WEIGHTS_BYTES_PER_S,
            )  # fmt: skip
            return model, footing

        host = await stack.enter_async_context(RingHost(settings.host, get_model, peers))
        member = RingMember(host, name)
        with leaving.member(member, host):
            return await member.run(lambda: _dial(addresses, transport, swarm_pass))


def _nobody() -> Snapshot:
    """Of the directory, before there is one."""
    raise ConfigError("the ring's model is asked of its starter only")
