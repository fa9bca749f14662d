"""A made-up model and peers that hand it out in memory, honestly or not."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from shoal.base.content import content_hash
from shoal.base.ids import PeerId
from shoal.client.weight_ledger import Item
from shoal.client.weight_sources import Dial, Place
from shoal.lab.weights import MemoryShelf
from shoal.net.address import Address, ListenAddress
from shoal.net.channel import PURPOSE_WEIGHTS, Channel, accept_channel, open_channel
from shoal.net.conditions import Conditions
from shoal.net.membership import SwarmPass
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Stream
from shoal.server.weights import WeightsConfig, WeightServer
from tests.unit.discovery_cases import identity

PASS = SwarmPass.open("tests")
MANIFEST = b"the manifest of a model that does not exist"
_RNG = random.Random(7)
TENSORS = [_RNG.randbytes(size) for size in (0, 1, 700_000, 300_000, 1_000, 1_300_000, 262_144)]
FILES = {"tokenizer.json": b"{}" * 1000, "generation_config.json": b'{"eos_token_id": 2}'}

Handler = Callable[[Channel], Awaitable[None]]


def shelf(**options: object) -> MemoryShelf:
    """The whole model, or what `options` say."""
    return MemoryShelf(MANIFEST, TENSORS, **options)  # type: ignore[arg-type]


MODEL = shelf().model


def items(*numbers: int) -> list[Item]:
    """The tensors of these numbers; all when none is given."""
    return [
        Item(
            content=bytes.fromhex(content_hash(TENSORS[number])),
            num_bytes=len(TENSORS[number]),
            label=f"tensor {number}",
            index=number,
        )
        for number in numbers or range(len(TENSORS))
    ]


def lying(whole: MemoryShelf, number: int, at: int = 0) -> MemoryShelf:
    """`whole`, with one byte of one tensor changed."""
    content = content_hash(TENSORS[number])
    spoilt = bytearray(whole.by_hash[content])
    spoilt[at] ^= 1
    whole.by_hash[content] = bytes(spoilt)
    return whole


@dataclass
class Swarm:
    """Peers in memory, and the client that fetches from them."""

    network: MemoryNetwork
    places: list[Place] = field(default_factory=list)
    servers: list[WeightServer] = field(default_factory=list)
    dialled: list[PeerId] = field(default_factory=list)

    @property
    def dial(self) -> Dial:
        transport = self.network.transport(identity(99).peer)

        async def dial(address: Address) -> Channel:
            self.dialled.append(address.peer)
            return await open_channel(transport, address, PURPOSE_WEIGHTS, PASS)

        return dial

    async def add(self, handler: Handler, stack: AsyncExitStack) -> Place:
        """A peer whose weights streams `handler` serves."""
        peer = identity(1 + len(self.places)).peer

        async def serve(stream: Stream) -> None:
            channel, _ = await accept_channel(stream, PASS)
            await handler(channel)

        transport = self.network.transport(peer)
        where = ListenAddress("memory", f"host{len(self.places)}", 1)
        listener = await transport.listen(where, serve)
        stack.push_async_callback(transport.close)
        self.places.append(Place(peer, (listener.address,)))
        return self.places[-1]


@asynccontextmanager
async def swarm(
    *shelves: MemoryShelf | Handler,
    config: WeightsConfig | None = None,
    conditions: Conditions | None = None,
) -> AsyncIterator[Swarm]:
    """One peer for each shelf, or for each handler of its streams."""
    made = Swarm(MemoryNetwork(conditions))
    async with AsyncExitStack() as stack:
        for one in shelves:
            if isinstance(one, MemoryShelf):
                server = WeightServer(one, config)
                made.servers.append(server)
                await made.add(server.serve, stack)
            else:
                await made.add(one, stack)
        yield made
