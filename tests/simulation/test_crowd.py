"""A server with fifty sessions dies, and there are two spares: who waits for whom."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest

from shoal.server.sessions import IDLE_VICTIM_S
from tests.simulation.scene import Scene, now_s, run_virtual

SERVERS = "a 0:2, b 2:4, c 4:6, spare-1 2:4, spare-2 2:4"
SPARES = ("spare-1", "spare-2")
PAGE_TOKENS = 16
"""Of the toy backend."""

SESSIONS = 50
STEPS = 15
BEFORE_S = 1.0
"""How long all decode before the death."""

ITERATION_S = 0.01
TOKEN_S = 0.001
BUDGET_S = 1.5 * ITERATION_S + 512 * TOKEN_S
"""An iteration of a spare that is full to the budget."""


class Crowd:
    """Fifty readers, the oldest first, and when each of them got its tokens."""

    def __init__(self, it):
        self._it = it
        self.readers = []
        self.times = []

    async def open(self, num_clients, prompt):
        it = self._it
        clients = [await it.swarm.open_client(patience_s=600.0) for _ in range(num_clients)]
        for index in range(SESSIONS):
            client = clients[index % num_clients]
            self.readers.append(await it.read(prompt, client=client, seed=index, chunk_tokens=64))
            self.times.append([])
            await asyncio.sleep(0.01)
        assert {reader.chain[1] for reader in self.readers} == {"b"}

    async def lose(self, name):
        """All decode; in the midst of it the server dies. Everybody finishes."""

        async def decode(reader, times):
            for _ in range(STEPS):
                await reader.decode(1)
                times.append(now_s())

        async with asyncio.TaskGroup() as group:
            for reader, times in zip(self.readers, self.times, strict=True):
                group.create_task(decode(reader, times))
            await asyncio.sleep(BEFORE_S)
            assert all(0 < len(times) < STEPS for times in self.times)
            await self._it[name].crash()

    @property
    def pauses_s(self):
        """The longest that each reader waited for a token."""
        return [max(after - before for before, after in pairwise(times)) for times in self.times]

    def at(self, name):
        """(index, pause) of the sessions that went to this server, the oldest first."""
        return [
            (index, pause_s)
            for index, (reader, pause_s) in enumerate(zip(self.readers, self.pauses_s, strict=True))
            if reader.chain[1] == name
        ]


def crowd(num_clients, prompt, spare_tokens=1 << 18):
    """The crowd after the death of its server; each spare's cache holds so many tokens."""
    crowds = []

    async def story():
        it = Scene(
            SERVERS, iteration_s=ITERATION_S, token_s=TOKEN_S, cache_tokens=1 << 18,
            patience_s=600.0,
        )  # fmt: skip
        for name in SPARES:
            it[name].spec = replace(it[name].spec, cache_tokens=spare_tokens)
        async with it:
            crowds.append(Crowd(it))
            await crowds[0].open(num_clients, prompt)
            await crowds[0].lose("b")

    run_virtual(story, timeout_s=5000.0)
    return crowds[0]


MANY = [1, pytest.param(50, marks=pytest.mark.slow)]
"""All sessions are one client's, or each has one of its own."""


@pytest.mark.parametrize("num_clients", MANY)
def test_the_oldest_goes_on_first_and_both_spares_take_part(num_clients):
    """Replays take turns by seniority, so nobody waits for the replay of one that is younger.

    The clients decide at the same moment; by the power of two choices they don't all choose
    the same spare.
    """
    after = crowd(num_clients, prompt=120)
    assert all(len(reader.session.recoveries) == 1 for reader in after.readers)
    for name in SPARES:
        waited = after.at(name)
        assert len(waited) >= SESSIONS / 4
        for (older, pause_s), (younger, other_s) in pairwise(waited):
            assert pause_s <= other_s + 2 * BUDGET_S, (older, younger)
        assert waited[0][1] < waited[-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("num_clients", [1, 50])
def test_spares_that_hold_half_of_the_sessions_serve_all_one_after_the_other(num_clients):
    """Room is given by seniority: the old go on, the young wait until the old have finished."""
    prompt = 120
    pages = -(-(prompt + STEPS) // PAGE_TOKENS)
    after = crowd(num_clients, prompt, spare_tokens=PAGE_TOKENS * pages * SESSIONS // 4)
    old, young = after.pauses_s[: SESSIONS // 5], after.pauses_s[-SESSIONS // 5 :]
    assert max(old) < IDLE_VICTIM_S < min(young)


def test_replays_yield_to_the_fresh_rows_of_others():
    """A stranger's answer at the spare goes on beside twenty replays, half as fast at worst."""

    async def story():
        async with Scene(
            "a 0:2, b 2:4, c 4:6, spare 2:4", iteration_s=ITERATION_S, token_s=TOKEN_S,
            cache_tokens=1 << 18,
        ) as it:  # fmt: skip
            stranger = await it.swarm.open_client()
            stranger.experience.failed(it["b"].peer, now_s())
            reader = await it.read(20, client=stranger)
            assert reader.chain[1] == "spare"
            others = [await it.read(200, seed=seed, chunk_tokens=64) for seed in range(20)]
            undisturbed_s = await token_s(reader, 40)
            await it["b"].crash()
            replays = asyncio.gather(*(other.decode(1) for other in others))
            crowded_s = await token_s(reader, 40)
            assert not replays.done()
            await replays
            assert crowded_s <= 2.2 * undisturbed_s, crowded_s / undisturbed_s

    run_virtual(story, timeout_s=5000.0)


async def token_s(reader, count):
    """The mean time of a token."""
    started_s = now_s()
    await reader.decode(count)
    return (now_s() - started_s) / count
