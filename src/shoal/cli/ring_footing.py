"""How a machine stands in a ring's swarm: transport, directory, door, weights to hand out."""

from __future__ import annotations

import random
import socket
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Final

from shoal.base.errors import ConfigError
from shoal.cli.models import OpenModel
from shoal.cli.own_addresses import own_addresses, own_host
from shoal.cli.ring_host import Footing, empty_facts
from shoal.cli.shelves import ThreadedShelf
from shoal.discovery.gossip import GossipConfig, GossipDirectory
from shoal.model.shelf import ModelShelf
from shoal.model.store_source import StoreSource
from shoal.net.address import Address, ListenAddress, parse_listen
from shoal.net.channel import PURPOSE_GOSSIP, PURPOSE_WEIGHTS
from shoal.net.identity import Identity
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport
from shoal.server.announcing import StoreBook
from shoal.server.config import StreamService
from shoal.server.door import Door
from shoal.server.weights import WeightsConfig, WeightServer
from shoal.wire.ring import RingModel

SCHEME: Final = "tcp"
LOOPBACK: Final = "127.0.0.1"


async def stand(
    stack: AsyncExitStack,
    identity: Identity,
    swarm_pass: SwarmPass,
    transport: Transport,
    *,
    model: OpenModel,
    ring: RingModel,
    listen: ListenAddress,
    announce: str | None = None,
    joins: tuple[Address, ...] = (),
    services: Mapping[str, StreamService] | None = None,
    weights_bytes_per_s: int,
) -> Footing:
    """Listen, join the directory, hand out weights; until the stack ends.

    Raises:
        ConfigError: the address can't be listened on, or nobody else could reach it.
        PeerUnreachable: none of the joins answers.
    """
    directory = GossipDirectory(
        transport, GossipConfig(swarm_pass=swarm_pass, joins=joins), random.SystemRandom()
    )
    book = StoreBook(directory.store)
    offered = {
        PURPOSE_GOSSIP: directory.serve,
        PURPOSE_WEIGHTS: _weights(model, weights_bytes_per_s).serve,
        **(services or {}),
    }
    facts = empty_facts(model, ring.dtype, ring.cache_tokens)
    door = Door(swarm_pass, book, facts, offered)
    listener = await transport.listen(listen, door.serve_stream)
    try:
        await stack.enter_async_context(directory)
    except BaseException:
        await listener.close()  # who tries again would not get the port
        raise
    return Footing(
        identity=identity,
        swarm_pass=swarm_pass,
        transport=transport,
        directory=directory,
        door=door,
        book=book,
        addresses=own_addresses(listener.address, str(listen), announce),
        services=offered,
    )


def _weights(model: OpenModel, bytes_per_s: int) -> WeightServer:
    if model.manifest is None:
        raise ConfigError(f"{model.given} has no manifest: nothing of it can be handed out")
    holds = model.source.holds if isinstance(model.source, StoreSource) else None
    shelf = ThreadedShelf(ModelShelf(model.source, model.manifest, holds))
    return WeightServer(shelf, WeightsConfig(rate_bytes_per_s=bytes_per_s))


def listen_near(given: str | None, towards: str | None, port: int = 0) -> ListenAddress:
    """Where to listen: as given, else on the address that this machine has `towards` a host.

    Without a host: the one it has in its network. A machine that is in none listens to itself
    alone, and says so.

    Raises:
        ConfigError: malformed.
    """
    if given is not None:
        return parse_listen(given)
    host = (None if towards is None else _address_towards(towards)) or own_host()
    if host is None:
        host = LOOPBACK
        print(
            f"this machine is in no network: only processes on it can reach {LOOPBACK}; "
            "connect it, or give --listen tcp://HOST:PORT",
            file=sys.stderr,
            flush=True,
        )
    return ListenAddress(SCHEME, host, port)


def _address_towards(host: str) -> str | None:
    """Our address on the way to `host`; sends nothing."""
    try:
        family = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
