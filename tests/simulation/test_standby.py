"""Hot standby: a hop beside the chain that is fed, and takes over at the price of one run."""

from shoal.client.tending import STANDBY_LAG_ROWS, TendConfig
from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.wire.messages import Broken
from tests.simulation.scene import scene, until

ONE = TendConfig(standby=1)
SHORT = EngineLimits(run_ahead_bytes=1000)
TRIO = "a 0:2, b 2:4, c 4:6, spare-a 0:2, spare-b 2:4, spare-c 4:6"


def standbys(reader):
    return sorted(
        (reader.scene.name(one.stage.peer), str(one.stage.span)) for one in reader.state.standbys
    )


async def stand_by(it, reader, count):
    """Until so many standbys hold all but the rows of one run."""

    def is_ready():
        found = [
            hop
            for name in it.servers
            for hop in it.hops(name)
            if hop.plan.is_standby and hop.plan.session == reader.session.id
        ]
        behind = [reader.session.length - hop.cache_length for hop in found]
        return len(found) == count and max(behind) < STANDBY_LAG_ROWS + 1

    await until(is_ready)


@scene(TRIO, tending=ONE)
async def test_every_hop_has_a_standby_that_keeps_up(it):
    reader = await it.read(40)
    await stand_by(it, reader, 3)
    await reader.decode(40)
    await stand_by(it, reader, 3)
    assert reader.chain == ["a", "b", "c"]
    assert standbys(reader) == [("spare-a", "[0,2)"), ("spare-b", "[2,4)"), ("spare-c", "[4,6)")]


def lose(name, spare):
    @scene(TRIO, tending=ONE)
    async def story(it):
        reader = await it.read(100)
        await stand_by(it, reader, 3)
        await reader.decode(20)
        before = it.hop(spare, reader).cache_length
        await it[name].crash()
        await reader.decode(20)
        assert spare in reader.chain
        (recovery,) = reader.session.recoveries
        assert recovery.replayed_tokens <= STANDBY_LAG_ROWS
        assert before > 100

    return story


def test_the_first_hop_dies():
    lose("a", "spare-a")()


def test_the_middle_hop_dies():
    lose("b", "spare-b")()


def test_the_last_hop_dies():
    lose("c", "spare-c")()


@scene("a 0:2, b 2:4, spare-b 2:4", tending=ONE, config=ServerConfig(engine=SHORT))
async def test_a_standby_goes_on_beyond_what_a_hop_may_run_ahead(it):
    reader = await it.read(200)
    await stand_by(it, reader, 1)
    await reader.decode(20)
    await stand_by(it, reader, 1)


@scene("a 0:4, b 2:4, c 0:2, spare-x 0:4", tending=ONE)
async def test_a_server_that_only_stands_by_drains_too(it):
    reader = await it.read(40)
    names = {name for name, _ in standbys(reader)}
    await until(lambda: reader.state.standbys)
    (name, *_) = {name for name, _ in standbys(reader)} - set(reader.chain) or names
    assert await it[name].server.drain(20.0)
    await reader.decode(5)
    assert name not in {other for other, _ in standbys(reader)}


@scene("a 0:2, b 2:4, " + ", ".join(f"spare-{n} 2:4" for n in range(6)), cache_tokens=64)
async def test_full_spares_do_not_hurt_the_session(it):
    others = [await it.open_client() for _ in range(2)]
    hogs = [await it.read(60, client=client) for client in others]
    reader = await it.read(20)
    await reader.decode(20, pause_s=0.5)
    assert reader.session.recoveries == ()
    assert len(hogs) == 2


@scene("a 0:2, b 2:4, spare-b 2:4", tending=ONE)
async def test_who_wants_no_standby_any_more_has_none_left(it):
    """An interrupted move leaves nothing behind."""
    reader = await it.read(40)
    await stand_by(it, reader, 1)
    reader.state.standbys = ()
    await reader.decode(30, pause_s=0.5)
    assert len(standbys(reader)) == 1


@scene("a 0:2, b 2:4, spare-a 0:2, spare-b 2:4", tending=ONE)
async def test_only_who_feeds_a_standby_can_say_that_it_is_unfit(it):
    reader = await it.read(20)
    await stand_by(it, reader, 2)
    state = reader.state
    (fed,) = [one.stage for one in state.standbys if it.name(one.stage.peer) == "spare-b"]
    told = Broken(state.id, 2, state.epoch, fed.peer, "unreachable")
    it.client.on_broken(it["b"].peer, told)
    assert fed.peer not in state.unfit
    it.client.on_broken(it["a"].peer, told)
    assert fed.peer in state.unfit
