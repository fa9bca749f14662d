"""The static directory: it knows what it is told by hand, and asks nobody.

For fixed clusters (records from a file), for tests, and for the lab, where one of them
is shared by all peers of a simulated swarm.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass

from shoal.base.errors import ConfigError, ShoalError
from shoal.base.ids import PeerId, short
from shoal.discovery.directory import Snapshot
from shoal.discovery.records import claimed_peer
from shoal.discovery.store import RecordStore
from shoal.discovery.watch import Watch
from shoal.net.address import Address, parse_address


class StaticDirectory:
    """A Directory over one store in this process; whoever shares it sees the same.

    Args:
        swarm: records of other swarms are refused.
        records: envelopes that are known from the start, taken when first asked.
        is_lasting: they, and later ones, never expire.
    """

    def __init__(
        self, swarm: str, records: Iterable[bytes] = (), *, is_lasting: bool = False
    ) -> None:
        self.store = RecordStore(swarm, is_lasting=is_lasting)
        self._watch = Watch(self.store)
        self._first = list(records)

    async def publish(self, data: bytes) -> None:
        """Make a record known to everybody who shares this directory.

        Raises:
            ConfigError: not a valid record of this swarm, or not later than our last.
        """
        self._take_first()
        accept_own(self.store, data)

    def snapshot(self) -> Snapshot:
        """What is known now.

        Raises:
            ConfigError: one of the records given at the start is bad.
        """
        self._take_first()
        return self._watch.snapshot()

    async def changed(self, version: int) -> Snapshot:
        """A snapshot whose version is not `version`; waits for one. Safe to cancel."""
        self._take_first()
        return await self._watch.changed(version)

    async def suspected(self) -> None:
        """Nobody suspects anybody here: never returns."""
        await asyncio.Event().wait()

    def _take_first(self) -> None:
        while self._first:
            accept_own(self.store, self._first.pop())


def accept_own(store: RecordStore, data: bytes, peer: PeerId | None = None) -> None:
    """Take a record that this process stands for; of `peer`, if that is given.

    Raises:
        ConfigError: not a valid record of this swarm, or not later than the last one.
    """
    try:
        if peer is not None and claimed_peer(data) != peer:
            raise ConfigError(f"it is not {short(peer)}'s own")
        is_news = store.accept(data, asyncio.get_running_loop().time())
    except ShoalError as error:
        raise ConfigError(f"can't publish this record: {error}") from error
    if not is_news:
        raise ConfigError(
            "can't publish this record: a later one of this peer is known (is the identity "
            "in use by another process, or did this machine's clock go back?)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryFile:
    """What a directory file names: peers to ask, and records to take as they are."""

    addresses: tuple[Address, ...]
    records: tuple[bytes, ...]


def parse_directory_file(text: str) -> DirectoryFile:
    """The addresses and records in a text: one a line, records as base64, `#` comments.

    Raises:
        ConfigError: a line is neither; names the line.
    """
    addresses: list[Address] = []
    records: list[bytes] = []
    for number, line in enumerate(text.splitlines(), 1):
        item = line.partition("#")[0].strip()
        try:
            if "://" in item:
                addresses.append(parse_address(item))
            elif item:
                records.append(base64.b64decode(item, validate=True))
        except (ConfigError, binascii.Error, ValueError) as error:
            raise ConfigError(
                f"line {number} of the directory file is neither an address nor a record "
                f"in base64: {error}"
            ) from error
    return DirectoryFile(addresses=tuple(addresses), records=tuple(records))


def format_directory_file(snapshot: Snapshot) -> str:
    """The records of a snapshot as a directory file."""
    lines = ["# One record a line, signed by its peer; addresses to ask may be added."]
    lines += [base64.b64encode(one.data).decode("ascii") for one in snapshot.records]
    return "\n".join(lines) + "\n"
