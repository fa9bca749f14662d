"""Simulated links: their times are right, their faults come and go, their runs repeat."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from shoal.base.errors import ConfigError, PeerTimeout, PeerUnreachable, ShoalError
from shoal.base.ids import PeerId
from shoal.lab.clock import Deadlock, run_virtual
from shoal.lab.network import LinkConditions, SimulatedNetwork
from shoal.net.address import parse_listen
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Listener, Stream

A, B, C = (PeerId(bytes([letter]) * 32) for letter in b"abc")


class World:
    """Alice dials, Bob notes when which frame came."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        conditions = {
            name: options.pop(name) for name in ("links", "break_after_s") if name in options
        }
        self.links = SimulatedNetwork(
            random.Random(seed), default=LinkConditions(**options), **conditions
        )
        self.network = MemoryNetwork(self.links)
        self.came: list[tuple[bytes, float]] = []
        self.far: Stream | None = None
        self.errors: list[str] = []

    async def connect(self) -> Stream:
        self.listener: Listener = await self.network.transport(B).listen(
            parse_listen("memory://b:1"), self._note
        )
        return await self.network.transport(A).dial(self.listener.address)

    async def _note(self, stream: Stream) -> None:
        self.far = stream
        try:
            while True:
                frame = await stream.receive()
                self.came.append((bytes(frame.header), now_s()))
        except ShoalError as error:
            self.errors.append(str(error))

    @property
    def names(self) -> list[bytes]:
        return [name for name, _ in self.came]


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_delay_and_handshake_times() -> None:
    async def scenario() -> None:
        world = World(delay_s=0.05)
        stream = await world.connect()
        assert now_s() == pytest.approx(0.2)
        await stream.send(b"1")
        await asyncio.sleep(1)
        assert world.came == [(b"1", pytest.approx(0.25))]

    run_virtual(scenario)


def test_frames_queue_for_the_rate() -> None:
    async def scenario() -> None:
        world = World(rate_bytes_per_s=1000, delay_s=0.1)
        stream = await world.connect()
        start_s = now_s()
        for name in (b"1", b"2", b"3"):
            await stream.send(name, b"x" * 491)
        await asyncio.sleep(5)
        times = [round(time - start_s, 6) for _, time in world.came]
        assert times == [0.6, 1.1, 1.6]
        assert world.links.traffic[A, B].frame_bytes == 1500

    run_virtual(scenario)


def test_the_opposite_direction_uses_the_same_link_unless_it_has_its_own() -> None:
    slow, fast = LinkConditions(delay_s=1), LinkConditions(delay_s=0.1)
    network = SimulatedNetwork(random.Random(0), links={(A, B): slow, (A, C): slow, (C, A): fast})
    assert network.link(B, A) is slow
    assert network.link(C, A) is fast
    assert network.link(B, C) == LinkConditions()


@pytest.mark.parametrize(
    "options",
    [
        {"jitter_s": 0.5, "loss": 0.3},
        {"jitter_s": 0.5, "drop": 0.3},
        {"jitter_s": 0.1, "duplicate": 0.5},
    ],
    ids=["loss", "drop", "duplicate"],
)
def test_chance_keeps_order_and_repeats_with_the_seed(options: dict[str, float]) -> None:
    def run(seed: int) -> list[tuple[bytes, float]]:
        async def scenario() -> list[tuple[bytes, float]]:
            world = World(seed=seed, **options)
            stream = await world.connect()
            for number in range(100):
                await stream.send(b"%03d" % number)
                await asyncio.sleep(0.01)
            await asyncio.sleep(100)
            return world.came

        return run_virtual(scenario)

    came = run(7)
    assert run(7) == came
    assert run(8) != came
    names = [name for name, _ in came]
    firsts = list(dict.fromkeys(names))
    assert firsts == sorted(firsts)
    if "loss" in options:
        assert len(names) == 100
    if "drop" in options:
        assert 50 < len(names) < 90
    if "duplicate" in options:
        assert len(firsts) == 100
        assert 120 < len(names) < 180


def test_a_short_cut_delays_and_a_long_one_breaks() -> None:
    async def scenario() -> None:
        world = World(break_after_s=10)
        stream = await world.connect()
        for length_s, name in ((5, b"1"), (20, b"2")):
            world.links.cut(A, B)
            await stream.send(name)
            await asyncio.sleep(length_s)
            world.links.heal()
            await asyncio.sleep(1)
        assert world.came == [(b"1", pytest.approx(5))]
        with pytest.raises(PeerUnreachable, match="10 s"):
            await stream.send(b"3")

    run_virtual(scenario)


def test_a_one_way_cut_lets_the_other_way_through() -> None:
    async def scenario() -> None:
        world = World()
        stream = await world.connect()
        await asyncio.sleep(0.1)
        world.links.cut(A, B)
        await stream.send(b"lost for now")
        assert world.far is not None
        await world.far.send(b"back")
        assert bytes((await stream.receive()).header) == b"back"
        assert world.names == []
        world.links.mend(A, B)
        await asyncio.sleep(0.1)
        assert world.names == [b"lost for now"]

    run_virtual(scenario)


@pytest.mark.parametrize(
    ("groups", "is_open"),
    [(([A], [B, C]), False), (([A, B], [C]), True), (([C],), True), (([B],), False)],
)
def test_partitions(groups: tuple[list[PeerId], ...], is_open: bool) -> None:
    async def scenario() -> None:
        world = World()
        stream = await world.connect()
        world.links.partition(*groups)
        await stream.send(b"1")
        await asyncio.sleep(1)
        assert world.names == ([b"1"] if is_open else [])
        dialling = world.network.transport(A).dial(world.listener.address)
        if is_open:
            await dialling
        else:
            with pytest.raises(PeerTimeout):
                await dialling

    run_virtual(scenario)


def test_a_black_hole_swallows_and_nobody_notices() -> None:
    async def scenario() -> None:
        world = World()
        stream = await world.connect()
        world.links.black_hole(A, B)
        await stream.send(b"1")
        await asyncio.sleep(3600)
        world.links.heal()
        await stream.send(b"2")
        await asyncio.sleep(1)
        assert world.names == [b"2"]
        assert world.links.traffic[A, B].dropped == 1

    run_virtual(scenario)


def test_a_frozen_peer_goes_on_where_it_was() -> None:
    async def scenario() -> None:
        world = World()
        stream = await world.connect()
        world.links.freeze(B)
        await stream.send(b"1")
        await asyncio.sleep(3600)
        assert world.names == []
        world.links.thaw(B)
        await asyncio.sleep(1)
        assert world.names == [b"1"]

    run_virtual(scenario)


def test_waiting_for_a_frozen_peer_is_a_deadlock_not_a_timer() -> None:
    async def scenario() -> None:
        world = World()
        stream = await world.connect()
        world.links.freeze(B)
        await stream.send(b"1")
        await stream.receive()

    with pytest.raises(Deadlock):
        run_virtual(scenario)


def test_forbidden_dials_are_refused_and_open_streams_live_on() -> None:
    async def scenario() -> None:
        world = World(delay_s=0.1)
        stream = await world.connect()
        world.links.forbid_dialing(A, B)
        with pytest.raises(PeerUnreachable):
            await world.network.transport(A).dial(world.listener.address)
        await stream.send(b"1")
        await asyncio.sleep(1)
        assert world.names == [b"1"]

    run_virtual(scenario)


def test_a_slow_link_takes_its_factor() -> None:
    async def scenario() -> None:
        world = World(delay_s=0.1, rate_bytes_per_s=1000)
        stream = await world.connect()
        world.links.slow(A, B, 10)
        start_s = now_s()
        await stream.send(b"1", b"x" * 91)
        await asyncio.sleep(5)
        assert world.came[0][1] - start_s == pytest.approx(2.0)

    run_virtual(scenario)


def test_resets_and_corruption_end_streams() -> None:
    async def scenario(options: dict[str, float]) -> list[str]:
        world = World(**options)
        stream = await world.connect()
        for _ in range(1000):
            try:
                await stream.send(b"1")
            except PeerUnreachable:
                return world.errors
            await asyncio.sleep(0.01)
        raise AssertionError("the stream survived")

    (error,) = run_virtual(scenario({"reset": 0.1}))
    assert "reset" in error
    (error,) = run_virtual(scenario({"corrupt": 0.5}))
    assert "limit" in error


@pytest.mark.parametrize("options", [{"loss": 1.0}, {"drop": 1.5}, {"rate_bytes_per_s": 0}])
def test_impossible_conditions(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        LinkConditions(**options)
