"""Logs have a budget like caches: what is given up, given back, and repaired from."""

import asyncio

import pytest

from shoal.server.config import ServerConfig
from shoal.server.engine import EngineLimits
from shoal.server.quotas import Quotas
from tests.simulation.scene import scene, until

ROW_BYTES = 64
CHAIN = "a 0:2, b 2:4, c 4:6, spare-a 0:2, spare-b 2:4, spare-c 4:6"


def bounded(rows, *, rows_in_all=1 << 20):
    """A budget of so many rows per session."""
    return ServerConfig(
        window_bytes=4 * ROW_BYTES,
        engine=EngineLimits(
            log_bytes_per_session_max=rows * ROW_BYTES, run_ahead_bytes=4 * ROW_BYTES
        ),
        quotas=Quotas(log_bytes_max=rows_in_all * ROW_BYTES),
    )


QUICK = bounded(1 << 20)
"""Acknowledges soon, so that logs may be trimmed."""


def log_rows(it, name):
    return sum(hop.log.num_bytes for hop in it.hops(name)) // ROW_BYTES


def trim(it, *names):
    """Memory pressure takes all that may go."""
    for name in names:
        for hop in it.hops(name):
            hop.log.trim(hop.outbound.acked)


# --- budgets --------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "chunk"), [(4, 16), (200, 16), (200, 256)])
def test_a_session_keeps_to_its_budget_at_every_hop(prompt, chunk):
    """At the last one too, where a long prompt has one row and the answer all."""

    @scene("a 0:2, b 2:4", config=bounded(32))
    async def story(it):
        reader = await it.read(prompt, chunk_tokens=chunk)
        await reader.decode(2)  # the first row behind the prompt shortens the log
        longest = 0
        for _ in range(120):
            await reader.decode(1)
            longest = max(longest, log_rows(it, "a"), log_rows(it, "b"))
        assert longest <= 32 + 16 + 8
        assert log_rows(it, "b") <= 40

    story()


@scene("a 0:2, b 2:4", config=bounded(1 << 20, rows_in_all=100))
async def test_all_logs_of_a_server_keep_to_one_budget_and_are_given_back(it):
    readers = [await it.read(40, seed=seed) for seed in range(4)]
    for _ in range(10):
        for reader in readers:
            await reader.decode(3)
    assert log_rows(it, "a") <= 100 + 4 * 8
    for reader in readers:
        it.readers.remove(reader)
        reader.check()
        reader.session.close()
    await until(lambda: not it.hops("a"))
    assert log_rows(it, "a") == 0


@scene("a 0:4", config=bounded(1 << 20, rows_in_all=60))
async def test_a_client_that_logs_much_does_not_shorten_the_log_of_one_that_logs_little(it):
    small = await it.read(4, client=await it.swarm.open_client())
    await small.decode(5)
    large = await it.read(100, seed=1)
    await large.decode(80)
    await small.decode(1)
    assert it.hop("a", small).log.start == 0
    assert it.hop("a", large).log.start > 0


# --- repair from a shortened log -----------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "trimmed", "refilled"),
    [
        ("c", "", "c"),
        ("c", "b", "bc"),
        ("c", "ab", "abc"),
        ("b", "a", "ab"),
        ("b", "", "b"),
        ("a", "", "a"),
    ],
)
def test_repair_starts_where_the_log_still_reaches_back(lost, trimmed, refilled):
    """One hop earlier for each log that does not, at worst at the client."""

    @scene(CHAIN, config=QUICK)
    async def story(it):
        reader = await it.read(40)
        await reader.decode(20)
        trim(it, *trimmed)
        runs = {name: it[name].backend.runs for name in "abc" if name != lost}
        await it[lost].crash()
        await reader.decode(3)
        assert reader.chain == [f"spare-{n}" if n == lost else n for n in "abc"]
        again = "".join(n for n in runs if it[n].backend.runs > runs[n] + 5)
        assert again == refilled.replace(lost, "")

    story()


@scene(CHAIN, config=QUICK)
async def test_logs_shortened_while_the_replacement_is_filled(it):
    reader = await it.read(320)
    await it["c"].crash()
    step = asyncio.ensure_future(reader.decode(3))
    await until(lambda: (hop := it.hop("spare-c", reader)) and 0 < hop.settled_length < 200)
    trim(it, "a", "b")
    await it["spare-c"].crash()
    await it["c"].start()
    await step
    assert reader.chain[:2] == ["a", "b"]


@scene(CHAIN, config=QUICK)
async def test_the_hop_that_makes_its_log_anew_dies_meanwhile(it):
    reader = await it.read(320)
    trim(it, "a", "b")
    await it["c"].crash()
    step = asyncio.ensure_future(reader.decode(3))
    await until(lambda: 0 < it.hop("b", reader).settled_length < 200)
    await it["b"].crash()
    await step
    assert reader.chain == ["a", "spare-b", "spare-c"]


@pytest.mark.parametrize("lost", ["b", "c"])
def test_shortened_logs_and_a_truncation(lost):
    @scene(CHAIN, config=QUICK)
    async def story(it):
        reader = await it.read(60)
        await reader.decode(20)
        trim(it, "a", "b")
        reader.truncate(30)
        await it[lost].crash()
        await reader.decode(5)
        await reader.verify(4)
        trim(it, "a", "b")
        reader.truncate(10)
        await reader.decode(5)

    story()


@pytest.mark.parametrize("length", [10, 70])
@pytest.mark.parametrize("is_parent_open", [True, False])
def test_shortened_logs_and_forks(length, is_parent_open):
    """A fork of a session whose log does not reach back, and then a death."""

    @scene(CHAIN, config=QUICK)
    async def story(it):
        parent = await it.read(60)
        await parent.decode(20)
        trim(it, "a", "b", "c")
        child = await parent.fork(length)
        if not is_parent_open:
            it.readers.remove(parent)
            parent.session.close()
        await child.decode(3)
        await it["c"].crash()
        await child.decode(3)
        if is_parent_open:
            await parent.decode(3)

    story()


@scene(CHAIN, config=QUICK, cache_tokens=256)
async def test_shortened_logs_and_evictions(it):
    readers = [await it.read(60, seed=seed) for seed in range(3)]
    trim(it, "a", "b")
    for name in "bc":
        it[name].server.evict_all()
    await it["c"].crash()
    async with asyncio.timeout(200.0), asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(reader.decode(5))
