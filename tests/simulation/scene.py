"""Sets the scene of a simulated story: named servers, readers that compare every row.

`@scene("a 0:2, b 2:4, spare-b 2:4")` runs an async test on virtual time, in a swarm of
these servers. Spares are slower, so a router takes them only when it must; servers called
`late...` don't start by themselves. While the story runs, every server's books are
checked; at its end all sessions are closed, and nothing may be left of them.
"""

import asyncio
import copy
import random
from contextlib import suppress
from dataclasses import replace

from shoal.base.spans import Span
from shoal.lab.clock import run_virtual
from shoal.lab.invariants import check_contents, check_end, check_step
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.lab.script import Act, Reference, ScriptRunner
from shoal.lab.swarm import ServerSpec, SimulatedSwarm
from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits

DELAY_S = 0.005
ITERATION_S = 0.002
SPARE_ITERATION_S = 0.02
CHECK_PERIOD_S = 0.02
SETTLE_S = 40.0
"""Longer than every grace period, a client's silence included."""

TINY = ServerConfig(window_bytes=1, engine=EngineLimits(run_ahead_bytes=1))
"""One entry may be under way on each link, and one may wait."""


def scene(servers, *, link=None, config=None, timeout_s=1000.0, **spec):
    """A decorator that gives the test a Scene with these servers."""

    def decorate(story):
        def test():
            async def run():
                async with Scene(servers, link=link, config=config, **spec) as it:
                    await story(it)

            run_virtual(run, timeout_s=timeout_s)

        test.__name__, test.__doc__ = story.__name__, story.__doc__
        return test

    return decorate


class Scene:
    """A swarm, its network, and a first client."""

    def __init__(
        self, servers, *, link=None, config=None, seed=0, patience_s=120.0, tending=None,
        heads=None, **spec,
    ):  # fmt: skip
        self.rng = random.Random(seed)
        self.network = SimulatedNetwork(self.rng, default=link or LinkConditions(delay_s=DELAY_S))
        specs = [make_spec(text, spec) for text in servers.split(",")]
        specs = [replace(one, head=(heads or {}).get(one.name, "")) for one in specs]
        self.swarm = SimulatedSwarm(
            specs,
            self.network,
            self.rng,
            num_blocks=max(spec.span.end for spec in specs),
            server_config=config,
            mixes_call_shape=True,
        )
        self.servers = {server.spec.name: server for server in self.swarm.servers}
        self.readers = []
        self.gone = []
        """Clients that crashed: whatever is left in them does not count."""
        self._patience_s = patience_s
        self._tending = tending

    def __getitem__(self, name):
        return self.servers[name]

    async def __aenter__(self):
        await self.swarm.__aenter__()
        self.client = await self.open_client()
        self._watching = asyncio.ensure_future(self._watch())
        return self

    async def open_client(self):
        """One more client."""
        return await self.swarm.open_client(patience_s=self._patience_s, tending=self._tending)

    async def __aexit__(self, kind, *exc):
        try:
            if kind is None:
                await self._finish()
        finally:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
            await self.swarm.__aexit__(kind, *exc)

    async def _finish(self):
        for reader in self.readers:
            if reader.client not in self.gone:
                reader.check()
                reader.session.close()
        self.network.heal()
        await asyncio.sleep(SETTLE_S)
        check_end(self.swarm, [one for one in self.swarm.clients if one not in self.gone])

    async def _watch(self):
        while True:
            check_step(self.swarm)
            await asyncio.sleep(CHECK_PERIOD_S)

    async def read(self, prompt=0, *, client=None, seed=0, chunk_tokens=16, adapter=None):
        """A reader with a new session, and with a prompt of so many tokens in it."""
        reader = Reader(self, client or self.client, seed, chunk_tokens, adapter)
        await reader.run()
        self.readers.append(reader)
        if prompt:
            await reader.prefill(prompt)
        return reader

    def name(self, peer):
        """What the server is called here."""
        return next((n for n, server in self.servers.items() if server.peer == peer), "client")

    def names(self, peers):
        return [self.name(peer) for peer in peers]

    def hops(self, name):
        """The sessions that the server holds now."""
        server = self.servers[name].server
        return [] if server is None else list(server.sessions)

    def hop(self, name, reader):
        """The server's only hop of the reader's session, or None."""
        found = [hop for hop in self.hops(name) if hop.plan.session == reader.session.id]
        return found[0] if found else None


class Reader(ScriptRunner):
    """One user: every row that comes back is compared with one machine's."""

    def __init__(self, scene, client, seed, chunk_tokens, adapter=None):
        reference = Reference(scene.swarm.num_blocks, mixes_call_shape=True, adapter=adapter)
        super().__init__(client, (), random.Random(seed), reference)
        self.scene = scene
        self.client = client
        self._chunk_tokens = chunk_tokens

    async def prefill(self, count):
        await self.play(Act(kind="prefill", count=count))

    async def decode(self, count, *, pause_s=0.0):
        for _ in range(count):
            await self.play(Act(kind="decode", count=1, pause_s=pause_s))

    async def verify(self, count):
        await self.play(Act(kind="verify", count=count))

    async def fork(self, length):
        """A second reader with the first `length` positions; this one stays."""
        child = Reader(self.scene, self.client, 1, self._chunk_tokens, self.reference.adapter)
        child.session = await self.session.fork(length)
        child.reference = copy.deepcopy(self.reference)
        child.reference.truncate(length)
        self.scene.readers.append(child)
        return child

    def check(self):
        """Every hop holds exactly what one machine would have sent there."""
        check_contents(self.scene.swarm, self)

    @property
    def state(self):
        return self.client._sessions[self.session.id]

    @property
    def chain(self):
        """Names of the servers, in order."""
        return self.scene.names(stage.peer for stage in self.session.chain)

    @property
    def repairs(self):
        """(lost, replacement) of each repair, as names."""
        names = self.scene.names
        return [(names(one.lost), names(one.replacement)) for one in self.session.recoveries]


def make_spec(text, spec):
    name, span = text.split()
    start, end = map(int, span.split(":"))
    if name.startswith("spare"):
        iteration_s = spec.get("iteration_s", ITERATION_S)
        spec = {**spec, "iteration_s": max(SPARE_ITERATION_S, 1.5 * iteration_s)}
    is_late = name.startswith("late")
    return ServerSpec(name=name, span=Span(start, end), is_late=is_late, **spec)


async def until(condition, *, step_s=0.005, within_s=60.0):
    """Wait on virtual time until the condition holds; returns how long it took."""
    started_s = now_s()
    while not condition():
        if now_s() - started_s > within_s:
            raise AssertionError(f"not within {within_s} virtual seconds")
        await asyncio.sleep(step_s)
    return now_s() - started_s


def now_s():
    return asyncio.get_running_loop().time()
