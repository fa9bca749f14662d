"""The LoRA adapters of one server: its own, and those that clients brought.

Its own have labels, are announced and stay. What a client brings is that client's alone, found
by the adapter's name, counted against what one client and all together may keep, and forgotten
when others need the room and no session uses it: a route that names it is then answered
`AdapterMissing`, and the client brings it again. Tensors are in the backend; here is who owns
them. They are for the blocks that were served when they came: after a move they are loaded anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from shoal.base.adapters import (
    ITEM_BYTES,
    AdapterId,
    AdapterManifest,
    AdapterName,
    AdapterPart,
    parse_adapter_manifest,
)
from shoal.base.backend import BlockBackend
from shoal.base.errors import AdapterMissing, ConfigError, PeerBusy, PeerRefused
from shoal.base.ids import PeerId, short
from shoal.base.spans import Span
from shoal.net.origin import Origin
from shoal.server.shares import ADDRESS_SHARE, check_share, left_for

logger = logging.getLogger(__name__)

BYTES_MAX: Final = 1 << 30
"""All adapters that clients brought: 1 GiB, 100 of rank 8 for an 8B model's 32 blocks."""

BYTES_PER_CLIENT: Final = 256 << 20
"""A quarter, so that no client fills it alone."""

ADAPTERS_PER_CLIENT: Final = 64
"""Small ones cost little but their entries."""

ADAPTERS_MAX: Final = 1024
"""Those of all clients: sixteen clients' worth of entries."""

KEPT_ITEM_BYTES: Final = ITEM_BYTES["float32"]
"""Tensors are kept in float32 however they came."""

RETRY_AFTER_S: Final = 5.0
"""When to come back to a server whose adapters are all in use: the length of an answer."""

Key = tuple[PeerId, AdapterName]

_Room = tuple[int, int]
"""Bytes, and a number of adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """How much memory adapters that clients bring may take. 0 bytes: none are taken."""

    bytes_max: int = BYTES_MAX
    bytes_per_client: int = BYTES_PER_CLIENT
    adapters_per_client: int = ADAPTERS_PER_CLIENT
    adapters_max: int = ADAPTERS_MAX
    address_share: float = ADDRESS_SHARE
    """Of all of it, for all clients of one address."""

    def __post_init__(self) -> None:
        if self.bytes_max < 0 or self.bytes_per_client < 0 or self.adapters_per_client < 1:
            raise ConfigError("memory for adapters must not be negative, nor their number below 1")
        check_share(self.address_share)


@dataclass(slots=True)
class _Kept:
    """An adapter in the backend."""

    id: AdapterId
    num_bytes: int
    used_s: float
    origin: Origin | None = None
    """Where its owner came from."""


class AdapterStore:
    """Which adapters the backend holds, whose they are, and which must go."""

    def __init__(
        self,
        backend: BlockBackend,
        limits: AdapterLimits,
        in_use: Callable[[], Collection[AdapterId]],
    ) -> None:
        """`in_use` are those of the sessions that are open now."""
        self.limits = limits
        self._backend = backend
        self._in_use = in_use
        self._kept: dict[Key, _Kept] = {}
        self._coming: dict[Key, tuple[Origin | None, int]] = {}
        """Bytes promised to adapters that are on their way, and to where."""
        self._own: dict[AdapterName, AdapterPart] = {}
        self._own_ids: dict[AdapterName, _Kept] = {}
        self._retired: list[_Kept] = []
        """Forgotten here, not yet in the backend."""
        self._labels: dict[str, AdapterName] = {}
        self._next_id = 0
        self._loading = asyncio.Lock()

    @property
    def labels(self) -> Mapping[str, AdapterName]:
        """Our own adapters, as they are announced."""
        return self._labels

    @property
    def num_bytes(self) -> int:
        """Memory of what clients brought, with what is on its way."""
        return sum(num_bytes for _, num_bytes in self._held())

    def __len__(self) -> int:
        return len(self._kept)

    async def add_own(self, label: str, adapter: AdapterPart) -> None:
        """Serve an adapter of our own.

        Raises:
            AdapterBad: it doesn't fit the model.
            ConfigError: another one has this label.
        """
        if label in self._labels:
            raise ConfigError(f"two adapters are called {label!r}: give them different names")
        name = adapter.manifest.name
        self._own[name] = adapter
        await self._load_own(name)
        self._labels[label] = name

    async def make_ready(self, adapter: bytes) -> None:
        """Load an adapter of our own for the blocks that are served now, if it is one."""
        name = AdapterName(adapter)
        if name in self._own and not self._is_current(self._own_ids.get(name)):
            await self._load_own(name)

    def find(self, owner: PeerId, adapter: bytes) -> AdapterId | None:
        """The adapter for a session of `owner` that opens now; None for an empty name.

        Raises:
            AdapterMissing: it is not here for the blocks that are served now.
        """
        if not adapter:
            return None
        name = AdapterName(adapter)
        kept = self._own_ids.get(name) or self._kept.get((owner, name))
        if kept is None or not self._is_current(kept):
            raise AdapterMissing(f"adapter {name.hex()} is not here: send it")
        kept.used_s = asyncio.get_running_loop().time()
        return kept.id

    def holds(self, owner: PeerId, name: AdapterName) -> bool:
        """Whether `find` would find it."""
        return any(
            self._is_current(kept)
            for kept in (self._own_ids.get(name), self._kept.get((owner, name)))
        )

    async def admit(
        self, owner: PeerId, name: AdapterName, text: bytes, origin: Origin | None = None
    ) -> AdapterManifest:
        """Judge what a client offers, and keep room for it until `take` or `give_up`.

        `origin` is where it connects from.

        Raises:
            AdapterBad: malformed, or it doesn't fit the model.
            PeerRefused: more than one client may keep here.
            PeerBusy: all there is room for is in use, or it is on its way already.
        """
        manifest = parse_adapter_manifest(text, name)
        self._backend.check_adapter(manifest)
        key = (owner, name)
        if key in self._coming:
            raise PeerBusy("this adapter is on its way already", retry_after_s=RETRY_AFTER_S)
        num_bytes = self._kept_bytes(manifest)
        limits = self.limits
        if num_bytes > min(limits.bytes_per_client, limits.bytes_max):
            raise PeerRefused(
                f"an adapter of {num_bytes} bytes in blocks {self._span}, and one client may keep "
                f"{min(limits.bytes_per_client, limits.bytes_max)} (see --adapter-memory)"
            )
        for victim in self._victims(owner, origin, num_bytes):
            self._retired.append(self._kept.pop(victim))
        self._coming[key] = origin, num_bytes
        try:
            await self._sweep()
        except BaseException:
            self.give_up(owner, name)
            raise
        return manifest

    async def take(self, owner: PeerId, part: AdapterPart, span: Span) -> None:
        """Load what `admit` let in; `span` is what was served then.

        Raises:
            AdapterBad: values that are not finite.
            AdapterMissing: other blocks are served now; offer it again.
        """
        name = part.manifest.name
        async with self._loading:
            if span != self._span:
                raise AdapterMissing(f"blocks {self._span} are served here now: offer it again")
            origin, _ = self._coming.get((owner, name), (None, 0))
            kept = await self._load(part, self._kept_bytes(part.manifest), origin)
            before = self._kept.pop((owner, name), None)
            self._kept[owner, name] = kept
            self._coming.pop((owner, name), None)
        if before is not None:
            self._retired.append(before)
        await self._sweep()
        logger.info("adapter taken name=%s owner=%s bytes=%d",
                    name.hex(), short(owner), kept.num_bytes)  # fmt: skip

    def give_up(self, owner: PeerId, name: AdapterName) -> None:
        """It does not come after all. Idempotent."""
        self._coming.pop((owner, name), None)

    def _victims(self, owner: PeerId, origin: Origin | None, num_bytes: int) -> list[Key]:
        """Who must go so that it fits.

        Raises:
            PeerBusy: all is in use.
        """
        victims, wanted = list[Key](), (num_bytes, 1)
        mine, near = self._left_for_owner(owner), self._left_for_address(origin)
        total = self.limits.bytes_max - self.num_bytes, self.limits.adapters_max - self._number
        for key in self._unused():
            kept = self._kept[key]
            is_mine, is_near = key[0] == owner, origin is not None and kept.origin == origin
            is_in_the_way = _lacks(total, wanted)
            is_in_the_way |= is_mine and _lacks(mine, wanted)
            is_in_the_way |= is_near and _lacks(near, wanted)
            if is_in_the_way:
                victims.append(key)
                total = _freed(total, kept)
                mine = _freed(mine, kept) if is_mine else mine
                near = _freed(near, kept) if is_near else near
        for left, whose in ((mine, "your"), (near, "your address'"), (total, "all")):
            if _lacks(left, wanted):
                raise PeerBusy(
                    f"{whose} adapters here are in use, and there is no room for more of them",
                    retry_after_s=RETRY_AFTER_S,
                )
        return victims

    def _left_for_owner(self, owner: PeerId) -> _Room:
        limits = self.limits
        number = sum(1 for key in (*self._kept, *self._coming) if key[0] == owner)
        return limits.bytes_per_client - self._bytes_of(owner), limits.adapters_per_client - number

    def _left_for_address(self, origin: Origin | None) -> _Room:
        limits, held = self.limits, self._held()
        left_bytes = left_for(
            origin, held, total=limits.bytes_max,
            share=limits.address_share, per_client=limits.bytes_per_client,
        )  # fmt: skip
        left_number = left_for(
            origin, [(one, 1) for one, _ in held], total=limits.adapters_max,
            share=limits.address_share, per_client=limits.adapters_per_client,
        )  # fmt: skip
        return left_bytes, left_number

    def _held(self) -> list[tuple[Origin | None, int]]:
        """Bytes of each adapter that is here or on its way, and where it came from."""
        kept = [(kept.origin, kept.num_bytes) for kept in self._kept.values()]
        return kept + list(self._coming.values())

    @property
    def _number(self) -> int:
        return len(self._kept) + len(self._coming)

    def _unused(self) -> list[Key]:
        """Those that no session uses: of other blocks first, then the longest unused."""
        used = self._in_use()
        keys = [key for key, kept in self._kept.items() if kept.id not in used]
        return sorted(
            keys, key=lambda key: (self._is_current(self._kept[key]), self._kept[key].used_s)
        )

    def _bytes_of(self, owner: PeerId) -> int:
        kept = sum(kept.num_bytes for key, kept in self._kept.items() if key[0] == owner)
        return kept + sum(count for key, (_, count) in self._coming.items() if key[0] == owner)

    async def _load_own(self, name: AdapterName) -> None:
        async with self._loading:
            old = self._own_ids.get(name)
            if self._is_current(old):
                return  # somebody else waited for it too
            part = self._own[name]
            within = {block.index for block in part.manifest.within(self._span)}
            ours = {index: data for index, data in part.blocks.items() if index in within}
            self._own_ids[name] = await self._load(
                AdapterPart(manifest=part.manifest, blocks=ours), 0
            )
        if old is not None:
            self._retired.append(old)
        await self._sweep()

    async def _sweep(self) -> None:
        """Free what is forgotten and no session uses any more."""
        while True:
            used = self._in_use()
            kept = next((kept for kept in self._retired if kept.id not in used), None)
            if kept is None:
                return
            self._retired.remove(kept)
            try:
                await self._backend.drop_adapter(kept.id)
            except BaseException:
                self._retired.append(kept)  # or nobody would free it any more
                raise

    async def _load(self, part: AdapterPart, num_bytes: int, origin: Origin | None = None) -> _Kept:
        self._next_id += 1
        kept = _Kept(
            id=AdapterId(self._next_id),
            num_bytes=num_bytes,
            used_s=asyncio.get_running_loop().time(),
            origin=origin,
        )
        await self._backend.load_adapter(kept.id, part)
        return kept

    def _kept_bytes(self, manifest: AdapterManifest) -> int:
        sent = manifest.num_bytes(self._span)
        return sent * KEPT_ITEM_BYTES // ITEM_BYTES[manifest.encoding]

    def _is_current(self, kept: _Kept | None) -> bool:
        """Whether the blocks that are served now have it: a move leaves them all behind."""
        return kept is not None and self._backend.holds_adapter(kept.id)

    @property
    def _span(self) -> Span:
        return self._backend.facts.span


def _lacks(left: _Room, wanted: _Room) -> bool:
    return left[0] < wanted[0] or left[1] < wanted[1]


def _freed(left: _Room, kept: _Kept) -> _Room:
    return left[0] + kept.num_bytes, left[1] + 1
