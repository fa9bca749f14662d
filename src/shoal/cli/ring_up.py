"""What `shoal ring up` does: wait for nodes, deal out blocks, hand out weights, keep watch."""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.base.errors import ConfigError, PeerTimeout, PeerUnreachable
from shoal.cli.joining import keep_on_lan, wall_clock
from shoal.cli.models import OpenModel, cache_dir
from shoal.cli.peer_weights import Swarm
from shoal.cli.ring_file import RingFile, written
from shoal.cli.ring_footing import listen_near, stand
from shoal.cli.ring_host import Footing, HostSettings, RingHost, tidy
from shoal.cli.ring_sizes import ring_sizes
from shoal.hf.head import load_head
from shoal.hf.head_batch import HeadBatch, find_head_tiles
from shoal.hf.ring_times import measure_head
from shoal.model.quantize import quantization
from shoal.model.rows import encodings_for
from shoal.net.address import Address
from shoal.net.channel import PURPOSE_RING, Channel
from shoal.net.identity import Identity
from shoal.net.loopback import loopback
from shoal.net.membership import SwarmKey, SwarmPass, join_by_invite
from shoal.net.tasks import TaskSet, first_failure
from shoal.net.tcp import TcpTransport
from shoal.plan.spec import DecodeTimes
from shoal.server.ring_desk import RingDesk
from shoal.server.ring_keeper import RingKeeper, RingWish
from shoal.server.ring_node import RingMember
from shoal.wire.ring import RingModel

NAME: Final = "ring"
"""Of the private swarm; whom its key admits is what counts."""

PORT: Final = 4270
"""Where a starter listens unless told otherwise: nodes that wait find the next ring there."""

HEAD_ROWS: Final = 4
"""The head is measured with 1 to so many rows."""

FAREWELL_S: Final = 3.0
"""How long an ending ring waits for its nodes to go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpSettings:
    """What `shoal ring up` was asked to do."""

    wish: RingWish
    listen: str | None
    announce: str | None
    is_lan: bool
    swarm: str | None
    """An open swarm that anybody may join; None: a private one."""
    dtype: str
    quantize: str
    exact: str
    cache_tokens: int
    weights_bytes_per_s: int
    host: HostSettings
    ring_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class StarterKeys:
    """Who the starter is, and who may join: kept, so that nodes find the next ring by the same."""

    identity: Identity
    swarm: SwarmKey
    invite: str


def starter_keys(folder: Path) -> StarterKeys:
    """Those in the folder; made if they are missing.

    Raises:
        ConfigError: the folder can't be written, or others can read it.
    """
    identity = Identity.load_or_create(folder / "starter.key")
    path, invite_path = folder / "swarm.key", folder / "invite"
    if not path.exists():
        SwarmKey.create(NAME).save(path)
    key = SwarmKey.load(path)
    try:
        invite = invite_path.read_text(encoding="ascii").strip()
    except OSError:
        invite = key.invite()
        handle = os.open(invite_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(invite)
    return StarterKeys(identity=identity, swarm=key, invite=invite)


async def keep_up(settings: UpSettings, model: OpenModel) -> None:
    """Bring the ring up and keep it up, until cancelled.

    Raises:
        ConfigError: the nodes can't hold the model, or not in the split asked for.
    """
    if model.manifest is None:
        raise ConfigError(f"{model.given} has no manifest: give a directory or a file")
    keys = starter_keys(cache_dir() / "ring")
    invite = None if settings.swarm else keys.invite
    async with AsyncExitStack() as stack:
        transport = TcpTransport(keys.identity)
        stack.push_async_callback(transport.close)
        ring = RingModel(
            bytes.fromhex(model.name), settings.dtype, settings.quantize, settings.exact,
            settings.cache_tokens,
        )  # fmt: skip
        desk = RingDesk(keys.identity.peer, ring)
        footing = await stand(
            stack, keys.identity, _pass(keys, settings.swarm), transport,
            model=model,
            ring=ring,
            listen=listen_near(settings.listen, None, PORT),
            announce=settings.announce,
            services={PURPOSE_RING: desk.serve},
            weights_bytes_per_s=settings.weights_bytes_per_s,
        )  # fmt: skip
        # Before anything else runs here: the starter's blocks are dealt out by it.
        head = await _head_times(settings, model) if settings.wish.starter_blocks != 0 else None
        tasks = TaskSet("ring")
        stack.push_async_callback(tasks.close)
        _say_how_to_join(footing.addresses[0], invite, settings)
        works = [_keep(settings, model, desk, footing, invite, head)]
        if settings.is_lan:
            works.append(_on_lan(footing, model))
        if settings.wish.starter_blocks != 0:
            works.append(_own_blocks(settings, model, desk, footing, tasks))
        try:
            await first_failure(*works)
        finally:
            await desk.end("its starter was stopped", FAREWELL_S)


async def _head_times(settings: UpSettings, model: OpenModel) -> DecodeTimes:
    """What embedding and head take on this machine, as `shoal ring run` computes them."""
    encoding = encodings_for(settings.dtype)[0]
    head = await asyncio.to_thread(load_head, model.source, dtype=encoding)
    batch = HeadBatch(head, await asyncio.to_thread(find_head_tiles, head))
    times = await measure_head(batch, head, encoding, HEAD_ROWS)
    del head, batch  # `shoal ring run` loads them again: by then this process has its blocks
    await tidy()
    return times


async def _keep(
    settings: UpSettings,
    model: OpenModel,
    desk: RingDesk,
    footing: Footing,
    invite: str | None,
    head: DecodeTimes | None,
) -> None:
    kind = quantization(settings.quantize)
    sizes = ring_sizes(model.source.config, settings.dtype, kind, settings.cache_tokens)
    keeper = RingKeeper(desk, sizes, settings.wish, say, head)
    file = RingFile(
        address=str(footing.addresses[0]),
        invite=invite,
        swarm=settings.swarm,
        given=_absolute(model.given),
        model=model.name,
    )

    async def when_up() -> None:
        await keeper.up.wait()
        with written(file, settings.ring_path):
            print(f"ready ring={settings.ring_path} address={file.address}", flush=True)
            await asyncio.Event().wait()

    await first_failure(keeper.run(), when_up())


async def _own_blocks(
    settings: UpSettings, model: OpenModel, desk: RingDesk, footing: Footing, tasks: TaskSet
) -> None:
    """The starter as a node of its own ring, over a stream inside the process."""

    async def get_model(ring: RingModel) -> tuple[OpenModel, Footing]:
        return model, footing

    def peers(footing: Footing) -> Swarm:
        return Swarm(footing.transport, footing.swarm_pass, footing.directory.snapshot)

    async def dial() -> Channel:
        near, far = loopback(footing.identity.peer)
        tasks.spawn(serve(Channel(far)), "own node")
        return Channel(near)

    async def serve(channel: Channel) -> None:
        with suppress(PeerUnreachable, PeerTimeout):  # its other end was closed
            await desk.serve(channel)

    async with RingHost(settings.host, get_model, peers) as host:
        await RingMember(host, "starter").run(dial)


async def _on_lan(footing: Footing, model: OpenModel) -> None:
    address = footing.addresses[0]
    said = (footing.swarm_pass.name, model.name)
    await keep_on_lan(footing.directory, address, (address.host,), said)


def _pass(keys: StarterKeys, swarm: str | None) -> SwarmPass:
    if swarm is not None:
        return SwarmPass.open(swarm)
    return join_by_invite(keys.invite, keys.identity, clock=wall_clock)


def say(text: str) -> None:
    """Progress, for the person at the starter."""
    print(text, file=sys.stderr, flush=True)


def _say_how_to_join(address: Address, invite: str | None, settings: UpSettings) -> None:
    who = f"--invite {invite}" if invite else f"--swarm {settings.swarm}"
    print(f"starter address={address}", flush=True)
    print(f"join with: shoal ring join --starter {address} {who}", flush=True)
    if settings.is_lan:
        print(f"or, in this network: shoal ring join --lan {who}", flush=True)
    say(f"waiting for {settings.wish.num_nodes} nodes; Ctrl-C ends the ring")


def _absolute(given: str) -> str:
    """A path that other folders' commands find too; names stay."""
    return str(Path(given).resolve()) if Path(given).exists() else given
