"""Hot standby: a hop beside the chain that is fed, and takes over at the price of one run."""

from shoal.client.tending import STANDBY_LAG_ROWS, TendConfig
from tests.simulation.scene import scene, until

ONE = TendConfig(standby=1)
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
