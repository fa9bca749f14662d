"""A head that is told to stop lets its answers end, and takes no new ones."""

import asyncio

from tests.simulation.test_thin import ask, head_of, text, thin


@thin()
async def test_answers_at_work_end_before_a_head_leaves(it):
    whole = await text(it)
    client = await it.swarm.open_thin_client()
    session = await client.open_session()
    drained = []

    async def at(count):
        if count == 3:
            heads = head_of(it, session).heads
            drained.append(asyncio.ensure_future(heads.drain(60.0)))
        if count == 29:
            assert not drained[0].done()

    assert await ask(session, 30, at=at) == whole
    assert await drained[0]
    assert not session.recoveries
    left = session.head
    await ask(session, 5, prompt=(1,))
    assert session.head != left, "the next question goes elsewhere"
    session.close()


@thin()
async def test_a_head_that_leaves_waits_no_longer_than_it_may(it):
    client = await it.swarm.open_thin_client()
    session = await client.open_session()
    said = []

    async def at(count):
        if count == 3:
            said.append(await head_of(it, session).heads.drain(0.01))

    await ask(session, 200, at=at)
    assert said == [False]
    session.close()
