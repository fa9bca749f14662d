"""A node of a ring takes other blocks while clients read over it: no row is wrong, none is lost."""

import asyncio
from dataclasses import replace

import pytest

from shoal.base.errors import ConfigError
from shoal.base.spans import Span
from shoal.lab.swarm import SimulatedServer
from shoal.server.ring_blocks import RingBlocks
from tests.simulation.scene import scene, until


class Node:
    """A simulated server whose blocks are dealt out; its record follows."""

    def __init__(self, server: SimulatedServer, *, fault=None, load_s=1.0):
        self._sim = server
        self._fault, self._load_s = fault, load_s
        self.said = []
        self.blocks = RingBlocks(
            server.server, server._switching, self._load, self, self._tidy, leave_s=5.0
        )

    async def take(self, start, end, *, is_beside=False):
        await self.blocks.take(Span(start, end), is_beside=is_beside)

    async def _load(self, span):
        await asyncio.sleep(self._load_s)
        if self._fault is not None:
            raise self._fault
        self._backend = self._sim._toy(span)
        return self._backend

    async def _tidy(self):
        self.said.append("tidied")

    async def loading(self, facts):
        self.said.append(f"loading {facts.span}")

    async def serving(self, facts):
        self.said.append(f"serving {facts.span}")
        self._sim.spec = replace(self._sim.spec, span=facts.span)
        self._sim.backend = self._backend
        self._sim._boots += 1
        self._sim._swarm.publish(self._sim, self._sim._address, self._sim._boots)

    async def idle(self):
        self.said.append("idle")


@scene("a 0:2, b 2:4, c 4:6")
async def test_who_has_no_room_gives_its_blocks_up_and_takes_more(it):
    reader = await it.read(prompt=20)
    await reader.decode(5)
    node = Node(it["b"])
    await it["c"].crash()
    taking = asyncio.ensure_future(node.take(2, 6))
    await reader.decode(10)
    assert taking.done()
    assert node.said == ["tidied", "loading [2,6)", "serving [2,6)"]
    assert len(it.hops("b")) >= 1
    assert it["b"].server.engine.rows > 0


@scene("a 0:2, b 2:4, c 4:6")
async def test_who_has_room_takes_more_beside_what_it_serves(it):
    reader = await it.read(prompt=20)
    node = Node(it["b"])
    await it["c"].crash()
    taking = asyncio.ensure_future(node.take(2, 6, is_beside=True))
    await reader.decode(10, pause_s=0.2)
    await until(lambda: taking.done())
    assert node.said == ["serving [2,6)", "tidied"]
    await reader.decode(5)


@scene("a 0:2, b 2:4, late-b 2:4, c 4:6")
async def test_who_becomes_a_spare_is_left(it):
    reader = await it.read(prompt=20)
    node = Node(it["b"])
    await it["late-b"].start()
    await node.take(0, 0)
    assert node.said == ["tidied", "idle"]
    assert not len(node.blocks.span)
    await reader.decode(5)
    assert it.hop("late-b", reader)


@scene("a 0:2, b 2:4, late-b 2:4, c 4:6")
async def test_a_node_that_can_not_load_serves_nothing_and_says_so(it):
    reader = await it.read(prompt=20)
    node = Node(it["b"], fault=ConfigError("no room"))
    with pytest.raises(ConfigError, match="no room"):
        await node.take(2, 5)
    assert node.said == ["tidied", "loading [2,5)", "idle"]
    await it["late-b"].start()
    await reader.decode(5)
    assert it.hop("late-b", reader)


@scene("a 0:2, b 2:4, c 4:6")
async def test_beside_others_a_failed_load_changes_nothing(it):
    reader = await it.read(prompt=20)
    node = Node(it["b"], fault=ConfigError("no room"))
    with pytest.raises(ConfigError, match="no room"):
        await node.take(1, 5, is_beside=True)
    assert node.blocks.span == Span(2, 4)
    await reader.decode(5)
    assert reader.repairs == []


@scene("a 0:2, b 2:4, c 4:6")
async def test_a_node_that_was_told_to_stop_midway_can_be_told_again(it):
    node = Node(it["b"], load_s=5.0)
    taking = asyncio.ensure_future(node.take(2, 3))
    await asyncio.sleep(1.0)
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    assert not len(node.blocks.span)
    await node.take(2, 4)
    reader = await it.read(prompt=20)
    await reader.decode(3)
