"""What every Directory does: one suite, run on each implementation."""

from __future__ import annotations

import asyncio

import pytest

from shoal.base.errors import ConfigError
from shoal.base.limits import RECORD_TTL_S
from shoal.base.spans import Span
from shoal.lab.clock import run_virtual
from tests.contracts.directory_cases import KINDS, Kind, counters, open_members, until
from tests.unit.discovery_cases import signed

pytestmark = pytest.mark.parametrize("kind", KINDS)


def test_an_empty_directory(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 1) as (one,):
            assert one.directory.snapshot().records == ()

    run_virtual(work())


def test_what_one_publishes_all_see(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 3) as members:
            for member in members:
                await member.directory.publish(member.record(1))
            everybody = {bytes(member.identity.peer): 1 for member in members}
            for member in members:
                await until(member.directory, lambda snapshot: counters(snapshot) == everybody)

    run_virtual(work())


def test_a_view_carries_the_signed_bytes(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 2) as (one, two):
            data = one.record(1, start=3, end=7)
            await one.directory.publish(data)
            snapshot = await until(two.directory, lambda found: bool(found.records))
            (server,) = snapshot.view("model").servers
            assert (server.record, server.span) == (data, Span(3, 7))
            assert snapshot.view("model").num_blocks == 12

    run_virtual(work())


def test_a_later_record_takes_the_place_of_the_last(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 2) as (one, two):
            await one.directory.publish(one.record(1, state="joining"))
            await until(two.directory, lambda snapshot: bool(snapshot.records))
            await one.directory.publish(one.record(2, state="online"))
            snapshot = await until(
                two.directory, lambda found: counters(found) == {one.identity.peer: 2}
            )
            assert snapshot.records[0].record.state == "online"

    run_virtual(work())


def test_a_tombstone_takes_a_server_away(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 2) as (one, two):
            await one.directory.publish(one.record(1))
            await until(two.directory, lambda snapshot: bool(snapshot.records))
            await one.directory.publish(one.record(2, state="offline", addresses=[]))
            await until(two.directory, lambda snapshot: not snapshot.records)
            assert one.directory.snapshot().records == ()

    run_virtual(work())


def test_a_record_that_is_not_renewed_expires(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 2) as (one, two):
            await one.directory.publish(one.record(1))
            await until(two.directory, lambda snapshot: bool(snapshot.records))
            for member in (one, two):
                await until(member.directory, lambda snapshot: not snapshot.records)
            assert asyncio.get_running_loop().time() <= 2 * RECORD_TTL_S
            await asyncio.sleep(2 * RECORD_TTL_S)
            assert two.directory.snapshot().records == (), "nobody brings it back"

    run_virtual(work())


def test_publishing_nonsense_is_our_own_mistake(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 1) as (one,):
            await one.directory.publish(one.record(5))
            version = one.directory.snapshot().version
            for data, why in [
                (b"nonsense", "malformed"),
                (signed(one.identity, 6, swarm="elsewhere"), "swarm"),
                (one.record(5), "later"),
                (one.record(4), "later"),
            ]:
                with pytest.raises(ConfigError, match=why):
                    await one.directory.publish(data)
            assert one.directory.snapshot().version == version

    run_virtual(work())


def test_changed_answers_at_once_when_there_is_something_else_already(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 1) as (one,):
            version = one.directory.snapshot().version
            await one.directory.publish(one.record(1))
            snapshot = await one.directory.changed(version)
            assert counters(snapshot) == {one.identity.peer: 1}
            assert one.directory.snapshot().version == snapshot.version != version

    run_virtual(work())


def test_everybody_who_waits_is_woken_and_cancelling_harms_nobody(kind: Kind) -> None:
    async def work() -> None:
        async with open_members(kind, 1) as (one,):
            version = one.directory.snapshot().version
            waiting = [asyncio.create_task(one.directory.changed(version)) for _ in range(3)]
            await asyncio.sleep(1.0)
            waiting[0].cancel()
            await one.directory.publish(one.record(1))
            cancelled, *snapshots = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(cancelled, asyncio.CancelledError)
            assert snapshots == [one.directory.snapshot()] * 2

    run_virtual(work())
