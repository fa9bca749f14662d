"""Weights in memory: what peers hand out and fetch in tests and on virtual time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from shoal.base.content import content_hash, manifest_hash
from shoal.wire.weights import FileEntry, Holdings, pack_held


class MemoryShelf:
    """A shelf (`shoal.server.weights.Shelf`) of one made-up model.

    `tensors` are all of the model's, in the order of the manifest; `held` are the numbers of
    those that are here (default: all). `manifest` is any text: the model is named by its hash.
    """

    def __init__(
        self,
        manifest: bytes,
        tensors: Iterable[bytes],
        *,
        held: Iterable[int] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self._manifest = manifest
        self.model = manifest_hash(manifest)
        listed = list(tensors)
        numbers = set(range(len(listed)) if held is None else held)
        self._held = [index in numbers for index in range(len(listed))]
        self._files = dict(files or {})
        here = [listed[index] for index in sorted(numbers)]
        self.by_hash = {content_hash(data): data for data in (*here, *self._files.values())}
        self.by_hash[self.model] = manifest

    async def holdings(self, model: bytes) -> Holdings | None:
        """What is held of the model; None: it is another one."""
        if model.hex() != self.model:
            return None
        files = [
            FileEntry(name, len(data), bytes.fromhex(content_hash(data)))
            for name, data in self._files.items()
        ]
        return Holdings(0, len(self._manifest), pack_held(self._held), files)

    async def read(self, content: bytes, offset: int, count: int) -> bytes | None:
        """Bytes of what has this hash; None: not here."""
        found = self.by_hash.get(content.hex())
        return None if found is None else found[offset : offset + count]


class MemoryDraft:
    """A draft (`shoal.client.weight_fetch.Draft`) of a MemoryStore."""

    def __init__(self, store: MemoryStore, content: bytes) -> None:
        self._store, self._content = store, content
        self._data = store.drafts.setdefault(content, bytearray())

    @property
    def held(self) -> int:
        """Bytes from the start that are here."""
        return len(self._data)

    async def append(self, piece: memoryview) -> None:
        """Add the next bytes."""
        self._data += piece

    async def restart(self) -> None:
        """Forget what is held."""
        self._data.clear()

    async def finish(self) -> bool:
        """Keep it if it has its hash; else False."""
        if content_hash(bytes(self._data)) != self._content.hex():
            return False
        self._store.contents[self._content] = bytes(self._data)
        del self._store.drafts[self._content]
        return True

    async def close(self) -> None:
        """Nothing to let go of."""


class MemoryStore:
    """A store (`shoal.client.weight_fetch.Store`) without a disk."""

    def __init__(self) -> None:
        self.contents: dict[bytes, bytes] = {}
        """Finished, by content hash."""
        self.drafts: dict[bytes, bytearray] = {}
        """Begun."""

    async def begin(self, content: bytes, num_bytes: int) -> MemoryDraft:
        """Go on with an item, or begin it."""
        return MemoryDraft(self, content)

    async def digest(self, content: bytes, start: int, end: int) -> bytes:
        """BLAKE2b-128 over a part of a finished item."""
        return hashlib.blake2b(self.contents[content][start:end], digest_size=16).digest()
