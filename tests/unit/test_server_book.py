"""What a server's address book makes of the records in routes."""

from __future__ import annotations

import pytest

from shoal.base.errors import ProtocolError
from shoal.base.ids import PeerId
from shoal.discovery.allowance import UPDATES_BURST
from shoal.discovery.store import RecordStore
from shoal.lab.clock import run_virtual
from shoal.server.announcing import StoreBook
from tests.unit.discovery_cases import SWARM, identity, signed

ALICE = identity(1)


def test_one_record_too_many_is_no_reason_to_refuse_a_route() -> None:
    async def learn() -> RecordStore:
        store = RecordStore(SWARM)
        book = StoreBook(store)
        for counter in range(2 * UPDATES_BURST):
            book.learn(signed(ALICE, counter))
        return store

    held = run_virtual(learn()).find(PeerId(ALICE.peer))
    assert held is not None
    assert held.record.counter == UPDATES_BURST - 1


def test_a_record_that_is_none_is_refused() -> None:
    async def learn() -> None:
        StoreBook(RecordStore(SWARM)).learn(b"nonsense")

    with pytest.raises(ProtocolError):
        run_virtual(learn())
