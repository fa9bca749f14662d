"""Which adapters a server keeps, when its backend fails it."""

from __future__ import annotations

import asyncio
import random

import pytest

from shoal.base.adapters import AdapterId, AdapterPart
from shoal.base.errors import InternalError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.lab.toy_adapters import toy_adapter
from shoal.lab.toy_backend import ToyBackend, ToyConfig
from shoal.server.adapters import AdapterLimits, AdapterStore

SPAN = Span(0, 2)
OWNER = PeerId(bytes(32))
FIRST, SECOND = (toy_adapter(random.Random(seed), 2) for seed in (1, 2))


class Broken(ToyBackend):
    """Can't free adapters, for as long as it is broken."""

    is_broken = True

    async def drop_adapter(self, adapter: AdapterId) -> None:
        if self.is_broken:
            raise InternalError("injected: the device is gone")
        await super().drop_adapter(adapter)


async def bring(store: AdapterStore, part: AdapterPart) -> None:
    manifest = part.manifest
    await store.admit(OWNER, manifest.name, manifest.text())
    await store.take(OWNER, part, SPAN)


def test_an_offer_that_fails_can_be_made_again() -> None:
    async def story() -> None:
        backend = Broken(ToyConfig(span=SPAN, num_blocks=2))
        store = AdapterStore(backend, AdapterLimits(adapters_per_client=1), set)
        await bring(store, FIRST)
        first = store.find(OWNER, FIRST.manifest.name)
        assert first is not None
        for _ in range(2):  # the second one makes the first one go
            with pytest.raises(InternalError, match="injected"):
                await bring(store, SECOND)
            assert store.num_bytes == 0
            assert backend.holds_adapter(first)
        backend.is_broken = False
        await bring(store, SECOND)
        assert not backend.holds_adapter(first)
        assert store.holds(OWNER, SECOND.manifest.name)

    asyncio.run(story())
