"""The Directory contract: publish a record, see everybody's.

Implementations: `static.StaticDirectory`, `gossip.GossipDirectory`. Both pass
tests/contracts/test_directory.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from shoal.base.ids import PeerId
from shoal.discovery.records import Record, to_server_view
from shoal.plan.view import SwarmView


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRecord:
    """A checked record and the bytes that its peer signed."""

    record: Record
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Every valid record at one moment, by peer id; without peers that have gone."""

    version: int
    """Differs between two snapshots of one directory if anything else does."""
    records: tuple[SignedRecord, ...] = ()
    suspects: frozenset[PeerId] = frozenset()
    """Servers among them that somebody could not reach a moment ago: a hint, no more."""

    def find(self, peer: PeerId) -> SignedRecord | None:
        """The peer's record, if it has a valid one."""
        return next((one for one in self.records if one.record.peer == peer), None)

    def models(self) -> tuple[str, ...]:
        """The models that somebody serves, most servers first."""
        return tuple(
            name for name, _ in Counter(one.record.model for one in self.records).most_common()
        )

    def view(self, model: str, shape: tuple[int, int] | None = None) -> SwarmView:
        """The servers of one model, for decisions.

        `shape` is (num_blocks, hidden_size) if the caller knows the model; otherwise
        what most of its servers say. Servers that say something else are left out. A
        model that nobody serves gives a view without servers. A suspect is in it only
        if some of its blocks have no other server: then dialling it is worth a try.
        """
        mine = [one for one in self.records if one.record.model == model]
        shapes = Counter(_shape(one.record) for one in mine)
        if shape is None:
            shape = max(shapes, key=lambda found: (shapes[found], found), default=(0, 0))
        return SwarmView(
            model=model,
            num_blocks=shape[0],
            hidden_size=shape[1],
            servers=tuple(
                to_server_view(one.record, one.data)
                for one in self._without_needless_suspects(
                    [one for one in mine if _shape(one.record) == shape]
                )
            ),
        )

    def _without_needless_suspects(self, servers: list[SignedRecord]) -> list[SignedRecord]:
        if not self.suspects:
            return servers
        safe: set[int] = set()
        for one in servers:
            if one.record.peer not in self.suspects:
                safe.update(range(one.record.start, one.record.end))
        return [
            one
            for one in servers
            if one.record.peer not in self.suspects
            or not safe.issuperset(range(one.record.start, one.record.end))
        ]


def _shape(record: Record) -> tuple[int, int]:
    return record.num_blocks, record.hidden_size


class Directory(Protocol):
    """Knows the records of a swarm."""

    async def publish(self, data: bytes) -> None:
        """Make a signed record of ours known, in place of our last one.

        Returns when those who can be reached now have it; the rest get it later.

        Raises:
            ConfigError: not a valid record of this swarm, or not later than our last.
        """

    def snapshot(self) -> Snapshot:
        """What is known now."""

    async def changed(self, version: int) -> Snapshot:
        """A snapshot whose version is not `version`; waits for one. Safe to cancel."""
