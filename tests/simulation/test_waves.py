"""Many sessions of one client share a chain in even groups: nobody loses, all servers work."""

import asyncio
import random
from itertools import pairwise

import pytest

from shoal.client.waves import LATE_S, Waves
from shoal.lab.clock import run_virtual
from shoal.lab.network import LinkConditions
from shoal.lab.toy_blocks import encode_rows, toy_embedding
from tests.simulation.scene import Scene

ROW = encode_rows(toy_embedding(3), "float32")
PASS_S, ROW_S = 0.010, 0.001
LAN = LinkConditions(delay_s=0.0005)
PAIR = "a 0:2, b 2:4"


class Crowd:
    """Sessions that decode as fast as they can, in waves or not."""

    def __init__(self, it, *, is_free=False):
        self.it = it
        self.waves = None if is_free else Waves()
        self.came_s = {}

    async def decode(self, number, until_s, *, client=None, reader_s=0.0):
        """One session; its reader takes `reader_s` for each token."""
        loop, waves = asyncio.get_running_loop(), self.waves
        session = await (client or self.it.client).open_session("float32")
        came = self.came_s.setdefault(number, [])
        try:
            await session.step(ROW * 20, 20)
            while loop.time() < until_s:
                if waves is not None and not waves.may_leave(session):
                    await waves.turn(session)
                await session.step(ROW, 1)
                if waves is not None:
                    waves.came(session.id)
                came.append(loop.time())
                if reader_s:
                    await asyncio.sleep(reader_s)
        finally:
            if waves is not None:
                waves.leave(session.id)
                waves.leave(session.id)
            session.close()
        return session

    def speed(self, since_s, until_s, *, but=()):
        """Tokens per second of all together."""
        numbers = set(self.came_s) - set(but)
        times = [one for number in numbers for one in self.came_s[number]]
        return sum(since_s < one <= until_s for one in times) / (until_s - since_s)


def measured(
    sessions, *, servers=PAIR, link=LAN, is_free=False, others=0, slow=0, reader_s=1.0, seed=0
):
    """Tokens per second of so many sessions that begin one after the other."""

    async def story():
        async with Scene(servers, link=link, iteration_s=PASS_S, token_s=ROW_S) as it:
            crowd, strangers = Crowd(it, is_free=is_free), Crowd(it, is_free=True)
            stranger = await it.open_client()
            rng, now_s = random.Random(seed), asyncio.get_running_loop().time()
            end_s = now_s + 3.5

            async def begin(number):
                await asyncio.sleep(rng.random() * 0.3)
                if number >= sessions:
                    await strangers.decode(number, end_s, client=stranger)
                else:
                    is_slow = number < slow
                    await crowd.decode(number, end_s, reader_s=reader_s if is_slow else 0.0)

            await asyncio.gather(*map(begin, range(sessions + others)))
            if crowd.waves is not None:
                assert crowd.waves.num_sessions == 0
            return crowd.speed(now_s + 1.5, end_s, but=range(slow))

    return run_virtual(story, timeout_s=1000)


@pytest.mark.parametrize(
    ("sessions", "servers", "gain"),
    [(1, PAIR, 1.0), (2, PAIR, 1.0), (5, PAIR, 1.0), (12, PAIR, 1.05),
     (12, "a 0:1, b 1:2, c 2:3, d 3:4", 1.15)],
)  # fmt: skip
def test_even_groups_keep_all_servers_at_work(sessions, servers, gain):
    free = measured(sessions, servers=servers, is_free=True)
    assert measured(sessions, servers=servers) >= gain * free


def test_two_servers_take_turns_without_a_pause_however_they_begin():
    """Six rows take a server 16 ms; two groups of six leave every 16.75 ms."""
    best = 6 / (PASS_S + 6 * ROW_S + 0.00075)
    assert min(measured(12, seed=seed) for seed in range(3)) > 0.97 * best
    assert min(measured(12, seed=seed, is_free=True) for seed in range(3)) < 0.9 * best


def test_over_long_ways_nobody_waits():
    far = LinkConditions(delay_s=0.05)
    assert measured(12, link=far) >= measured(12, link=far, is_free=True)


def test_beside_another_clients_sessions_nobody_loses():
    assert measured(8, others=8) >= measured(8, others=8, is_free=True)


def test_slow_readers_hold_nobody_up():
    """Whoever takes a token a second is not waited for longer than a moment."""
    alone = measured(10)
    assert measured(12, slow=2) > 0.9 * alone
    assert LATE_S < 0.1


def test_waves_go_on_when_a_chain_is_repaired():
    async def story():
        servers = "a 0:2, b 2:4, spare-b 2:4"
        async with Scene(servers, link=LAN, iteration_s=PASS_S, token_s=ROW_S) as it:
            crowd, now_s = Crowd(it), asyncio.get_running_loop().time()
            works = [
                asyncio.ensure_future(crowd.decode(number, now_s + 8.0)) for number in range(8)
            ]
            await asyncio.sleep(2.0)
            await it["b"].crash()
            sessions = await asyncio.gather(*works)
            assert all(len(session.recoveries) == 1 for session in sessions)
            assert crowd.speed(now_s + 6.0, now_s + 8.0) > 100
            assert crowd.waves.num_sessions == 0

    run_virtual(story, timeout_s=1000)


def test_who_is_cancelled_in_its_turn_leaves_its_place():
    async def story():
        async with Scene(PAIR, link=LAN, iteration_s=PASS_S, token_s=ROW_S) as it:
            crowd, now_s = Crowd(it), asyncio.get_running_loop().time()
            works = [
                asyncio.ensure_future(crowd.decode(number, now_s + 4.0)) for number in range(12)
            ]
            for work in works[:5]:
                await asyncio.sleep(0.203)
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)
            for number in range(5, 12):
                gaps = [after - before for before, after in pairwise(crowd.came_s[number])]
                assert max(gaps) < 1.5

    run_virtual(story, timeout_s=1000)
