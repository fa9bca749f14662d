"""Full servers: a newcomer keeps its place in line and is called when there is room."""

import asyncio

from tests.simulation.scene import now_s, scene, until

ONE_SESSION = 64
"""Cache tokens: room for one session of this length."""


async def opened(it, client, order, name):
    reader = await it.read(8, client=client)
    order.append((name, now_s()))
    return reader


@scene("a 0:2", cache_tokens=ONE_SESSION)
async def test_who_waits_is_called_at_once(it):
    first = await it.read(60)
    order = []
    opening = asyncio.ensure_future(opened(it, await it.open_client(), order, "second"))
    await until(lambda: len(it["a"].server.sessions.line) == 1)
    await asyncio.sleep(25.0)  # longer than a list of sessions and several attempts
    assert len(it["a"].server.sessions.line) == 1
    closed_s = now_s()
    first.session.close()
    it.readers.remove(first)
    await opening
    assert order[0][1] - closed_s < 0.5


@scene("a 0:2", cache_tokens=ONE_SESSION)
async def test_first_come_first_served(it):
    first = await it.read(60)
    order, opening = [], []
    for name in ("second", "third", "fourth"):
        client = await it.open_client()
        opening.append(asyncio.ensure_future(opened(it, client, order, name)))
        await until(lambda: len(it["a"].server.sessions.line) == len(opening))
    await asyncio.sleep(12.0)
    for current in (first, *opening):
        reader = current if current is first else await current
        reader.session.close()
        it.readers.remove(reader)
    assert [name for name, _ in order] == ["second", "third", "fourth"]


@scene("a 0:2, b 0:2", cache_tokens=ONE_SESSION)
async def test_a_session_goes_where_there_is_room(it):
    """Asked before it is chosen: nobody is sent to a full server to be refused."""
    readers = [await it.read(60) for _ in range(2)]
    assert sorted(reader.chain[0] for reader in readers) == ["a", "b"]
    assert all(len(it[name].server.sessions.line) == 0 for name in ("a", "b"))
