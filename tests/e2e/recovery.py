"""Servers that are killed at chosen tokens and come back, and readers who see no difference.

A `Fleet` holds named servers. `Reader.read` writes one answer with the real client, in
this process, and does what `acts` says when that many tokens are there: so a kill falls
between the same two tokens in every run.
"""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from shoal.base.ids import peer_text
from shoal.cli.joining import SwarmChoice, visit
from shoal.cli.models import open_model
from shoal.client.chain_session import ChainSession
from shoal.client.client import Client, open_client
from shoal.client.config import ClientConfig
from shoal.client.session import Move, Recovery, SessionState
from shoal.client.tending import TendConfig
from shoal.hf.generation import generate
from shoal.hf.head import Head, load_head
from shoal.hf.sampling import Sampler
from tests.e2e.nursery import Nursery
from tests.e2e.processes import Server, end_all, servers
from tests.models import VOCABULARY

HOST = "127.0.0.1"
PORTS = (20_000, 30_000)
"""Below the range that Linux takes for connections: a port must be free after a kill."""

KNOWN_WITHIN_S = 30.0
"""A server that is ready is in everybody's directory by then."""

GREEDY = Sampler()
SAMPLED = Sampler(temperature=0.9, seed=11)
Act = Callable[[ChainSession], bool | None]


def exact_model():
    """Six blocks of a shape that exact mode has row tiles for, with seeded random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.normal_(1.0 if "norm" in name else 0.0, 0.12)
    return model.eval()


def free_port() -> int:
    """A port that nobody listens on and no outgoing connection is ever given."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as one:
            try:
                one.bind((HOST, port))
            except OSError:
                continue
        return port


def draw_prompt(length: int, seed: int = 0) -> list[int]:
    """So many random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY - 1) for _ in range(length)]


@dataclass
class Place:
    """Where a server lives, and what it is asked to do each time it starts."""

    name: str
    blocks: str
    extra: tuple[str, ...] = ()
    host: str = HOST
    namespace: int | None = None
    port: int = 0
    peer: str = ""
    server: Server | None = None
    is_stopped: bool = False


class Fleet:
    """Named servers of one model: `Fleet(nursery, model, folder, "a 0:2, b 2:6")`."""

    def __init__(
        self, nursery: Nursery, model: Path, folder: Path, servers: str, *extra: str,
        encoding: str = "float32",
    ) -> None:  # fmt: skip
        self.model = model
        self.encoding = encoding
        self._nursery = nursery
        self._folder = folder
        self._ended: list[Server] = []
        self._starting = ThreadPoolExecutor(1)
        self._wishes: list[Future[None]] = []
        self.places: dict[str, Place] = {}
        for text in servers.split(","):
            name, blocks, *own = text.split()
            self.places[name] = Place(name, blocks, (*extra, *own))

    # --- life and death ----------------------------------------------------------------

    def start(self, *names: str) -> None:
        """Start those of them that are down, each with its own identity and address."""
        places = [self.places[name] for name in names if self.places[name].server is None]
        for place in places:
            place.port = place.port or free_port()
        for place in places:
            joins = [part for address in self.addresses for part in ("--join", address)]
            listen = f"tcp://{place.host}:{place.port}"
            identity = str(self._folder / f"{place.name}.key")
            place.server = Server(
                self.model, place.blocks, "--listen", listen, "--identity", identity, *joins,
                *place.extra, launch=self._nursery.launch(place.namespace),
            )  # fmt: skip
            if not joins:
                self._finish(place)
        for place in places:
            self._finish(place)

    def _finish(self, place: Place) -> None:
        assert place.server is not None
        place.server.ready()
        place.peer = place.server.peer

    def kill(self, *names: str) -> None:
        """kill -9, all at the same moment."""
        for name in names:
            server, self.places[name].server = self.places[name].server, None
            assert server is not None, f"{name} is not up"
            server.signal(signal.SIGKILL)
            self._ended.append(server)

    def tell_to_leave(self, name: str) -> None:
        """SIGTERM: it drains and ends."""
        server, self.places[name].server = self.places[name].server, None
        assert server is not None, f"{name} is not up"
        server.signal(signal.SIGTERM)
        self._ended.append(server)

    def stop(self, name: str) -> None:
        """SIGSTOP: its sockets stay open, and nobody answers."""
        self.places[name].is_stopped = True
        self[name].signal(signal.SIGSTOP)

    def resume(self, *names: str) -> None:
        """SIGCONT (default: whoever is stopped)."""
        for name in names or [place.name for place in self.up if place.is_stopped]:
            self.places[name].is_stopped = False
            self[name].signal(signal.SIGCONT)

    def restart(self, *names: str) -> None:
        """Start them without waiting for it, one such wish after the other."""
        self._wishes.append(self._starting.submit(self.start, *names))

    def restore(self) -> None:
        """All are up again."""
        self.resume()
        self.restart(*(place.name for place in self.down))
        while self._wishes:
            self._wishes.pop().result()
        for server in self._ended:
            server.end()
        self._ended.clear()

    def end(self) -> None:
        """All are gone."""
        self._starting.shutdown()
        self.resume()
        end_all([*(place.server for place in self.up), *self._ended])

    # --- who is who --------------------------------------------------------------------

    def __getitem__(self, name: str) -> Server:
        server = self.places[name].server
        assert server is not None, f"{name} is not up"
        return server

    @property
    def up(self) -> list[Place]:
        """Places whose server runs."""
        return [place for place in self.places.values() if place.server is not None]

    @property
    def down(self) -> list[Place]:
        """Places whose server was killed or not started."""
        return [place for place in self.places.values() if place.server is None]

    @property
    def addresses(self) -> list[str]:
        """Where running servers can be joined."""
        return [place.server.address for place in self.up if place.server.address]

    def name(self, peer: bytes) -> str:
        """What the server with this id is called here."""
        return next(place.name for place in self.places.values() if place.peer == peer_text(peer))

    def chain(self, session: ChainSession) -> list[str]:
        """The names of the session's hops, in order."""
        return [self.name(stage.peer) for stage in session.chain]

    def settled(self, name: str) -> bool:
        """Whether it holds no session."""
        peer = self.places[name].peer
        return servers(self[name].address)[peer]["sessions"] == 0

    def repairs(self, recoveries: Iterable[Recovery]) -> list[tuple[list[str], list[str]]]:
        """(lost, replacement) of each, as names."""
        return [([*map(self.name, one.lost)], [*map(self.name, one.replacement)])
                for one in recoveries]  # fmt: skip

    def stop_hop(self, index: int) -> Act:
        """An act: stop this hop of the reader's chain."""
        return lambda session: self.stop(self.chain(session)[index])

    def kill_hops(self, *indices: int, restart: bool = False) -> Act:
        """An act: kill these hops of the reader's chain, and perhaps start them again."""

        def act(session: ChainSession) -> None:
            chain = self.chain(session)
            victims = [chain[index] for index in indices if self.places[chain[index]].server]
            self.kill(*victims)
            if restart:
                self.restart(*victims)

        return act


@dataclass(frozen=True)
class Reading:
    """One answer and how it came about."""

    token_ids: list[int]
    numerics: str
    recoveries: tuple[Recovery, ...]
    chain: list[str]
    longest_pause_s: float
    moves: tuple[Move, ...] = ()
    pauses_s: tuple[float, ...] = ()
    """Between each token and the next."""


class Reader:
    """A client process's worth of the real client: an identity, a directory, sessions."""

    def __init__(self, fleet: Fleet, client: Client, is_exact: bool) -> None:
        self.fleet = fleet
        self.client = client
        self.is_exact = is_exact
        """Whether all servers say that they are."""

    @property
    def sessions(self) -> list[SessionState]:
        """What is known of the sessions that are open."""
        return list(self.client._sessions.values())

    async def read(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        sampler: Sampler = GREEDY,
        acts: Mapping[int, Act] | None = None,
    ) -> Reading:
        """An answer; `acts[k]` is done when k tokens are there, or later: again until not False."""
        head = head_of(self.fleet.model, self.fleet.encoding)
        due = dict(acts or {})
        async with await self.client.open_session(self.fleet.encoding) as session:
            ids, times = [], []
            answer = generate(session, head, prompt, max_new_tokens=num_tokens, sampler=sampler)
            async for token in answer:
                ids.append(token.id)
                times.append(token.at_s)
                for at in [at for at in due if at <= len(ids)]:
                    if due[at](session) is not False:
                        del due[at]
            pauses = [after - before for before, after in pairwise(times)]
            return Reading(
                token_ids=ids,
                numerics=session.numerics,
                recoveries=session.recoveries,
                chain=self.fleet.chain(session),
                longest_pause_s=max(pauses, default=0.0),
                moves=session.moves,
                pauses_s=tuple(pauses),
            )


@asynccontextmanager
async def reader(
    fleet: Fleet, patience_s: float = 60.0, seed: int = 0, standby: int = 0
) -> AsyncIterator[Reader]:
    """A new client that knows all servers of the fleet that run now."""
    async with visit(SwarmChoice.parse(fleet.addresses, None, None)) as visitor:
        directory = visitor.directory
        expected = {place.server.peer for place in fleet.up if place.server.peer}
        async with asyncio.timeout(KNOWN_WITHIN_S):
            while not expected <= {peer_text(one.peer) for one in online(directory.snapshot())}:
                await directory.changed(directory.snapshot().version)
        records = online(directory.snapshot())
        config = ClientConfig(
            model=records[0].model,
            num_blocks=records[0].num_blocks,
            hidden_size=records[0].hidden_size,
            patience_s=patience_s,
            tending=TendConfig(standby=standby),
        )
        async with open_client(
            visitor.identity, visitor.transport, visitor.swarm_pass, directory, config,
            rng=random.Random(seed), wall_clock=time.time,  # noqa: TID251
        ) as client:  # fmt: skip
            yield Reader(fleet, client, all(record.is_exact for record in records))


def online(snapshot) -> list:
    """The records of servers that serve."""
    return [one.record for one in snapshot.records if one.record.state == "online"]


@cache
def head_of(model: Path, encoding: str) -> Head:
    """The model's head, loaded once."""
    return load_head(open_model(str(model)).source, dtype=encoding)


def killing_at(
    rng: random.Random, fleet: Fleet, num_tokens: int, num_kills: int, num_hops: int = 3
) -> dict[int, Act]:
    """Acts that kill random hops at random tokens; each comes back a moment later."""
    positions = rng.sample(range(1, num_tokens), num_kills)
    return {
        position: fleet.kill_hops(rng.randrange(num_hops), restart=True) for position in positions
    }


def read(
    fleet: Fleet,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    sampler: Sampler = GREEDY,
    acts: Mapping[int, Act] | None = None,
    patience_s: float = 60.0,
    standby: int = 0,
) -> Reading:
    """One answer of a new client; see `Reader.read`."""

    async def story() -> Reading:
        async with reader(fleet, patience_s, standby=standby) as one:
            return await one.read(prompt, num_tokens, sampler=sampler, acts=acts)

    return asyncio.run(story())


def pauses(reading: Reading) -> list[float]:
    """How long each repair kept the reader waiting, in seconds, for people."""
    return [round(one.pause_s, 3) for one in reading.recoveries]


async def until(condition: Callable[[], bool]) -> None:
    """Look again every millisecond."""
    async with asyncio.timeout(KNOWN_WITHIN_S):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


@contextmanager
def running(
    nursery: Nursery, model: Path, folder: Path, servers: str, *extra: str, encoding: str
) -> Iterator[Fleet]:
    """A fleet whose servers all run; they are gone at the end."""
    fleet = Fleet(nursery, model, folder, servers, *extra, encoding=encoding)
    try:
        fleet.start(*fleet.places)
        yield fleet
    finally:
        fleet.end()
