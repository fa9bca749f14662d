"""How fast bytes leave: what the system says, and what is made of it."""

import struct
import sys

import pytest

from shoal.net.identity import Identity
from shoal.net.sent_rate import Delivery, SentRates, parse_tcp_info
from shoal.net.tcp import TcpTransport
from tests.contracts.transport_cases import run
from tests.unit.tcp_cases import LOOPBACK


def tcp_info(rate, acknowledged, *, is_app_limited):
    data = bytearray(232)
    data[7] = int(is_app_limited)
    struct.pack_into("=Q", data, 120, acknowledged)
    struct.pack_into("=Q", data, 160, rate)
    return bytes(data)


@pytest.mark.parametrize("is_app_limited", [False, True])
def test_what_the_system_says(is_app_limited):
    data = tcp_info(5_000_000, 1 << 24, is_app_limited=is_app_limited)
    assert parse_tcp_info(data) == Delivery(5_000_000, 1 << 24, not is_app_limited)


def test_an_old_system_says_nothing():
    assert parse_tcp_info(b"\0" * 104) is None


def test_nothing_is_known_before_something_was_sent():
    assert SentRates().typical_bytes_per_s is None


def test_one_near_neighbour_says_little():
    rates = SentRates()
    for host, rate in (("10.0.0.2", 1e8), ("198.51.100.1", 2e6), ("198.51.100.2", 3e6)):
        rates.saw(host, rate)
    assert rates.typical_bytes_per_s == 3e6


def test_a_faster_look_counts_at_once_and_a_slower_one_little_by_little():
    rates = SentRates()
    for rate, expected in ((1e6, 1e6), (8e6, 8e6), (2e6, 5e6), (2e6, 3.5e6), (9e6, 9e6)):
        rates.saw("198.51.100.1", rate)
        assert rates.typical_bytes_per_s == expected


def test_memory_is_bounded():
    rates = SentRates(hosts_max=2)
    for host, rate in (("a", 1e6), ("b", 5e6), ("c", 7e6)):
        rates.saw(host, rate)
    assert rates.typical_bytes_per_s == 6e6, "a was silent longest"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell")
def test_a_busy_connection_is_measured_and_single_rows_are_not():
    async def work():
        ours, theirs = TcpTransport(Identity.generate()), TcpTransport(Identity.generate())

        async def swallow(stream):
            while True:
                frame = await stream.receive()
                await stream.send(b"had", str(len(frame.payload)).encode())

        try:
            listener = await theirs.listen(LOOPBACK, swallow)
            stream = await ours.dial(listener.address)
            await stream.send(b"row", b"\1" * 4096)
            await stream.receive()
            assert ours.sent_bytes_per_s() is None
            while not ours.sent_bytes_per_s():  # run's deadline ends it
                await stream.send(b"weights", b"\1" * (4 << 20))
                await stream.receive()
            stream.close()
        finally:
            await ours.close()
            await theirs.close()

    run(work())
