"""A dispatcher before real sessions: fast chains first, one line for the rest, repairs as ever."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from shoal.base.errors import NoRouteError, PeerBusy
from shoal.client.dispatch import open_dispatcher
from tests.simulation.scene import Reader, scene

TWO_CHAINS = "a 0:2, b 2:4, spare-a 0:2, spare-b 2:4"
SESSION_TOKENS = 8192
"""Two of them fit on a server."""


class Guest:
    """One request: a seat, and a reader on its chain."""

    def __init__(self, it, dispatcher):
        self.it, self.dispatcher = it, dispatcher
        self.stack = AsyncExitStack()
        self.reader = None

    async def come(self):
        seat = await self.stack.enter_async_context(self.dispatcher.seat())
        self.reader = Reader(self.it, self.it.client, 0, 16)
        self.reader.session = await self.it.client.open_session("float32", chain=seat.chain)
        seat.follow(self.reader.session)
        await self.reader.prefill(10)
        return self

    async def go(self):
        self.reader.check()
        self.reader.session.close()
        await self.stack.aclose()

    @property
    def chain(self):
        return self.reader.chain


async def until_settled():
    await asyncio.sleep(1.0)


@scene(TWO_CHAINS)
async def test_fast_chains_fill_first_and_the_rest_waits_in_order(it):
    async with open_dispatcher(it.client, session_tokens=SESSION_TOKENS) as dispatcher:
        assert dispatcher.num_seats == 4
        guests = [await Guest(it, dispatcher).come() for _ in range(4)]
        assert [one.chain for one in guests] == [["a", "b"]] * 2 + [["spare-a", "spare-b"]] * 2
        late = [asyncio.ensure_future(Guest(it, dispatcher).come()) for _ in range(2)]
        await until_settled()
        assert dispatcher.num_waiting == 2
        await guests[2].go()
        await until_settled()
        assert [one.done() for one in late] == [True, False], "first come, first served"
        assert late[0].result().chain == ["spare-a", "spare-b"]
        await guests[0].go()
        last = await late[1]
        assert last.chain == ["a", "b"]
        for one in (guests[1], guests[3], late[0].result(), last):
            await one.go()
        assert dispatcher.num_waiting == 0


@scene("a 0:2, b 2:4, late-a 0:2, late-b 2:4", patience_s=500.0)
async def test_servers_that_come_seat_who_waits(it):
    async with open_dispatcher(it.client, session_tokens=SESSION_TOKENS) as dispatcher:
        guests = [await Guest(it, dispatcher).come() for _ in range(2)]
        late = asyncio.ensure_future(Guest(it, dispatcher).come())
        await until_settled()
        assert not late.done()
        await it["late-a"].start()
        await it["late-b"].start()
        assert (await late).chain == ["late-a", "late-b"]
        for one in (*guests, await late):
            await one.go()


@scene(TWO_CHAINS)
async def test_a_repair_counts_where_it_went(it):
    async with open_dispatcher(it.client, session_tokens=SESSION_TOKENS) as dispatcher:
        guest = await Guest(it, dispatcher).come()
        await it["b"].crash()
        await guest.reader.decode(5)
        assert guest.chain == ["a", "spare-b"]
        assert dispatcher.num_seats in (2, 4), "composed anew, or soon"
        await until_settled()
        assert dispatcher.num_seats == 2, "spare-b bounds them all"
        other = await Guest(it, dispatcher).come()
        assert other.chain[1] == "spare-b"
        await guest.go()
        await other.go()


@scene(TWO_CHAINS)
async def test_a_chain_that_died_meanwhile_is_no_reason_to_fail(it):
    async with open_dispatcher(it.client, session_tokens=SESSION_TOKENS) as dispatcher:
        assert dispatcher.num_seats == 4
        await it["b"].crash()
        guest = await Guest(it, dispatcher).come()
        assert guest.chain[1] == "spare-b"
        await guest.go()


@scene("a 0:2, b 2:4", patience_s=5.0)
async def test_who_waits_too_long_or_leaves_is_out_of_the_line(it):
    async with open_dispatcher(it.client, session_tokens=SESSION_TOKENS) as dispatcher:
        guests = [await Guest(it, dispatcher).come() for _ in range(2)]
        leaver = asyncio.ensure_future(Guest(it, dispatcher).come())
        await until_settled()
        leaver.cancel()
        with pytest.raises(PeerBusy, match="no chain had a free place"):
            await Guest(it, dispatcher).come()
        assert dispatcher.num_waiting == 0
        with dispatcher.beside(guests[0].reader.session):
            await guests[1].go()
            waiter = asyncio.ensure_future(Guest(it, dispatcher).come())
            await until_settled()
            assert not waiter.done(), "a session that works again holds its place"
        await (await waiter).go()
        await guests[0].go()


@scene("a 0:2, late-b 2:4", patience_s=3.0)
async def test_where_blocks_are_missing_the_client_says_so(it):
    async with open_dispatcher(it.client, session_tokens=SESSION_TOKENS) as dispatcher:
        assert dispatcher.num_seats == 0
        async with dispatcher.seat() as seat:
            assert seat.chain == ()
            with pytest.raises(NoRouteError, match=r"\[2,4\)"):
                await it.client.open_session("float32", chain=seat.chain)


class Gate:
    """A composer that begins when it may, as a thread does that has much to compute."""

    def __init__(self):
        self.opened = asyncio.Event()
        self.opened.set()
        self.times = 0

    async def compose(self, work):
        self.times += 1
        await self.opened.wait()
        await asyncio.sleep(0.5)
        return work()


@scene("a 0:2, b 2:4, late-a 0:2, late-b 2:4", patience_s=500.0)
async def test_old_chains_serve_while_new_ones_are_composed(it):
    gate = Gate()
    async with open_dispatcher(
        it.client, session_tokens=SESSION_TOKENS, composer=gate.compose
    ) as dispatcher:
        gate.opened.clear()
        await it["late-a"].start()
        await it["late-b"].start()
        guests = [await Guest(it, dispatcher).come() for _ in range(2)]
        assert [one.chain for one in guests] == [["a", "b"]] * 2
        late = asyncio.ensure_future(Guest(it, dispatcher).come())
        await asyncio.sleep(5.0)
        assert (dispatcher.num_seats, gate.times) == (2, 2), "still composing"
        assert dispatcher.num_waiting == 1
        gate.opened.set()
        assert (await late).chain == ["late-a", "late-b"]
        assert (dispatcher.num_seats, gate.times) == (4, 2)
        for one in (*guests, await late):
            await one.go()


@scene("a 0:2, b 2:4, late-a 0:2, late-b 2:4", patience_s=500.0)
async def test_composing_leaves_time_for_other_things(it):
    gate = Gate()
    async with open_dispatcher(
        it.client, session_tokens=SESSION_TOKENS, composer=gate.compose
    ) as dispatcher:
        began_s = asyncio.get_running_loop().time()
        await it["late-a"].start()
        await it["late-b"].start()
        # 0.5 s are a fifth of 2.5 s.
        assert dispatcher.num_seats == 2
        await asyncio.sleep(began_s + 1.9 - asyncio.get_running_loop().time())
        assert (dispatcher.num_seats, gate.times) == (2, 1)
        await asyncio.sleep(1.0)
        assert (dispatcher.num_seats, gate.times) == (4, 2)
