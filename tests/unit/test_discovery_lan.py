"""Servers on the local network: what a notice says, and both sides over loopback."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from shoal.base.errors import ConfigError
from shoal.base.ids import peer_text
from shoal.discovery import lan
from shoal.discovery.lan import LanNotice, addresses_in, announced_on_lan, find_on_lan, lan_hosts
from shoal.net.address import Address
from tests.unit.discovery_cases import identity

ANN, BOB, CAT = (identity(number) for number in (1, 2, 3))
LOOPBACK = ("127.0.0.1",)


def notice(number: int, swarm: str = "home") -> LanNotice:
    return LanNotice(
        peer=identity(number).peer, hosts=LOOPBACK, port=4000 + number, swarm=swarm, model="m" * 64
    )


def texts(number: int = 1, **changes: bytes | None) -> dict[bytes, bytes | None]:
    entries = {key.encode(): value.encode() for key, value in notice(number).properties().items()}
    return entries | {key.encode(): value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("properties", "port"),
    [
        ({}, 1),
        (texts(peer=b"nonsense"), 1),
        (texts(peer=b"\xff\xff"), 1),
        (texts(peer=None), 1),
        (texts(swarm=b"other"), 1),
        (texts(), None),
        (texts(), 0),
    ],
)
def test_a_notice_that_makes_no_sense_is_ignored(
    properties: dict[bytes, bytes | None], port: int | None
) -> None:
    assert addresses_in(properties, LOOPBACK, port, "home") == ()


def test_a_notice_says_where_to_dial_whom() -> None:
    found = addresses_in(texts(future=b"x"), ("10.0.0.5", "192.168.1.2"), 4001, "home")
    assert found == tuple(
        Address("tcp", ANN.peer, host, 4001) for host in ("10.0.0.5", "192.168.1.2")
    )


def test_a_notice_holds_no_secrets() -> None:
    assert notice(1).properties() == {
        "peer": peer_text(ANN.peer), "swarm": "home", "model": "m" * 64
    }  # fmt: skip


def test_where_a_server_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lan_hosts("127.0.0.1") == ("127.0.0.1",)
    with pytest.raises(ConfigError, match="IPv4"):
        lan_hosts("my.host")
    monkeypatch.setattr("ifaddr.get_adapters", list)
    with pytest.raises(ConfigError, match="connected"):
        lan_hosts("0.0.0.0")


@pytest.mark.slow
def test_servers_of_a_swarm_are_found_and_others_are_not() -> None:
    async def work() -> None:
        async with asyncio.timeout(30), AsyncExitStack() as stack:
            notices = (notice(1), notice(2), notice(3, "other"))
            contexts = [announced_on_lan(one, LOOPBACK) for one in notices]
            await asyncio.gather(*(stack.enter_async_context(one) for one in contexts))
            found = await find_on_lan("home", LOOPBACK, gather_s=1.5)
        assert {address.peer for address in found} == {ANN.peer, BOB.peer}
        assert str(found[0]).endswith(("@127.0.0.1:4001", "@127.0.0.1:4002"))

    asyncio.run(work())


def test_nobody_there_takes_as_long_as_one_may_wait() -> None:
    async def work() -> None:
        assert await find_on_lan("home", LOOPBACK, browse_s=0.1) == ()
        assert "shoal serve --lan" in lan.none_found("home").detail

    asyncio.run(work())


def test_without_multicast_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: object) -> None:
        raise OSError("no such device")

    async def work() -> None:
        with pytest.raises(ConfigError, match="no multicast on this machine: no such device"):
            await find_on_lan("home")

    monkeypatch.setattr("shoal.discovery.lan.AsyncZeroconf", refuse)
    asyncio.run(work())
