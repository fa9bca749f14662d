"""Static directories and directory files."""

from __future__ import annotations

import base64

import pytest

from shoal.base.errors import ConfigError
from shoal.discovery.static import StaticDirectory, format_directory_file, parse_directory_file
from shoal.lab.clock import run_virtual
from tests.unit.discovery_cases import SWARM, identity, record, signed

ALICE, BOB = identity(1), identity(2)
ADDRESS = record(BOB).addresses[0]


def test_a_directory_file_comes_back_as_it_was_written() -> None:
    async def work() -> str:
        return format_directory_file(StaticDirectory(SWARM, [signed(ALICE)]).snapshot())

    text = run_virtual(work())
    file = parse_directory_file(f"{text}\n  {ADDRESS}  # a peer to ask\n")
    assert file.records == (signed(ALICE),)
    assert [str(address) for address in file.addresses] == [ADDRESS]


@pytest.mark.parametrize(
    "line", ["tcp://no-peer:1", "not base64!", "abc", "tcp://"], ids=["peer", "b64", "pad", "cut"]
)
def test_a_bad_line_is_named(line: str) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        parse_directory_file(f"# first\n{line}\n")


def test_given_records_last_if_a_person_vouches_for_them() -> None:
    async def work() -> int:
        directory = StaticDirectory(SWARM, [signed(ALICE, ttl_s=1.0)], is_lasting=True)
        version = directory.snapshot().version
        directory.store.accept(signed(BOB, ttl_s=1.0), 1e6)
        return len((await directory.changed(version)).records)

    assert run_virtual(work()) == 2


def test_a_bad_given_record_is_a_mistake_in_the_file() -> None:
    async def work() -> None:
        bad = parse_directory_file(base64.b64encode(b"bad").decode()).records
        with pytest.raises(ConfigError, match="malformed"):
            StaticDirectory(SWARM, bad).snapshot()

    run_virtual(work())
