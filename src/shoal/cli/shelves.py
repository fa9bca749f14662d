"""Disk work of the exchange of weights, in threads: the event loop never waits for a disk."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from typing import Any, Final

from shoal.model.shelf import ModelShelf
from shoal.model.weight_draft import Draft
from shoal.model.weight_store import WeightStore
from shoal.wire.weights import FileEntry, Holdings, pack_held

_READ_BYTES: Final = 16 << 20


class ThreadedShelf:
    """`shoal.server.weights.Shelf` over the one model that this process serves."""

    def __init__(self, shelf: ModelShelf) -> None:
        self._shelf = shelf

    async def holdings(self, model: bytes) -> Holdings | None:
        """What is held of the model; None: it is another one."""
        if model.hex() != self._shelf.model:
            return None
        return await asyncio.to_thread(self._holdings)

    def _holdings(self) -> Holdings:
        files = [
            FileEntry(one.name, len(one.data), bytes.fromhex(one.content))
            for one in self._shelf.side_files()
        ]
        return Holdings(0, len(self._shelf.text), pack_held(self._shelf.held()), files)

    async def read(self, content: bytes, offset: int, count: int) -> bytes | None:
        """Bytes of what has this hash; None: not here."""
        return await asyncio.to_thread(self._shelf.read, content.hex(), offset, count)


class ThreadedDraft:
    """`shoal.client.weight_fetch.Draft`: a draft of the store.

    A call that is cancelled goes on in its thread; the lock makes the next one wait for it.
    """

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._lock = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes from the start that are here."""
        return self._draft.held

    async def append(self, piece: memoryview) -> None:
        """Add the next bytes."""
        await self._run(self._draft.append, piece)

    async def restart(self) -> None:
        """Forget what is held."""
        await self._run(self._draft.restart)

    async def finish(self) -> bool:
        """Keep it if it has its hash; else False."""
        return bool(await self._run(self._draft.finish))

    async def close(self) -> None:
        """Let go of it."""
        await self._run(self._draft.close)

    async def _run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        def locked() -> Any:
            with self._lock:
                return call(*arguments)

        return await asyncio.to_thread(locked)


class ThreadedStore:
    """`shoal.client.weight_fetch.Store`: the local store."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store

    async def begin(self, content: bytes, num_bytes: int) -> ThreadedDraft:
        """Go on with an item, or begin it."""
        return ThreadedDraft(await asyncio.to_thread(self._store.begin, content.hex(), num_bytes))

    async def digest(self, content: bytes, start: int, end: int) -> bytes:
        """BLAKE2b-128 over a part of a finished item."""
        return await asyncio.to_thread(self._digest, content.hex(), start, end)

    def _digest(self, content: str, start: int, end: int) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for offset in range(start, end, _READ_BYTES):
            digest.update(self._store.read(content, offset, min(_READ_BYTES, end - offset)) or b"")
        return digest.digest()
