"""Where a download stands: what is missing, who sends what, and who sent which bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.base.ids import PeerId
from shoal.plan.fetching import FetchView, Flight, Wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A tensor or a file that is to be fetched."""

    content: bytes
    """Its content hash, 16 bytes."""
    num_bytes: int
    label: str
    """What people call it."""
    index: int | None = None
    """Its number in the manifest; None: a file beside the weights."""


@dataclass(slots=True)
class Share:
    """Consecutive bytes of one item that came from one peer."""

    peer: PeerId
    start: int
    end: int
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    """Over these bytes, to find the author if the whole is wrong."""

    def add(self, piece: memoryview) -> None:
        """The next bytes."""
        self.end += piece.nbytes
        self.digest.update(piece)


@dataclass(slots=True)
class Transfer:
    """What one peer is sending now."""

    peer: PeerId
    contents: tuple[bytes, ...]
    began_s: float
    came_bytes: int = 0

    def bytes_per_s(self, now_s: float) -> float:
        """Its speed so far."""
        return self.came_bytes / (now_s - self.began_s) if now_s > self.began_s else 0.0


class Ledger:
    """The books of one download. Only counts; `WeightFetch` acts."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.missing = {item.content: item for item in items}
        """Not finished yet, by content."""
        self.total_bytes = sum(item.num_bytes for item in self.missing.values())
        self.holders: dict[PeerId, frozenset[bytes]] = {}
        """What each peer in use holds of what was asked for."""
        self.transfers: dict[PeerId, Transfer] = {}
        self.speeds: dict[PeerId, float] = {}
        """Of each peer's last transfer, bytes per second."""
        self.fetched_bytes: Counter[PeerId] = Counter()
        self._at = dict.fromkeys(self.missing, 0)
        """How many bytes of each item are here."""
        self._finished_bytes = 0
        self._shares: dict[bytes, list[Share]] = {}
        self._suspects: dict[bytes, list[Share]] = {}

    @property
    def done_bytes(self) -> int:
        """Bytes that are here, checked or not."""
        return self._finished_bytes + sum(self._at.values())

    def view(self, now_s: float) -> FetchView:
        """The picture that decisions are made from."""
        flying = {content for one in self.transfers.values() for content in one.contents}
        return FetchView(
            wanted=tuple(
                Wanted(
                    content=content,
                    left_bytes=item.num_bytes - self._at[content],
                    is_begun=self._at[content] > 0,
                )
                for content, item in self.missing.items()
                if content not in flying
            ),
            holders=self.holders,
            flights=tuple(
                Flight(
                    peer=one.peer,
                    contents=tuple(c for c in one.contents if c in self.missing),
                    left_bytes=self._left(one.contents),
                    bytes_per_s=one.bytes_per_s(now_s),
                    age_s=now_s - one.began_s,
                )
                for one in self.transfers.values()
            ),
        )

    def _left(self, contents: Collection[bytes]) -> int:
        return sum(
            self.missing[content].num_bytes - self._at[content]
            for content in contents
            if content in self.missing
        )

    def may_need(self, peer: PeerId) -> bool:
        """Whether the peer holds anything that is missing, being sent or not."""
        return not self.holders.get(peer, frozenset()).isdisjoint(self.missing)

    # --- bytes and their authors ---------------------------------------------------------

    def begin(self, content: bytes, held: int, peer: PeerId) -> None:
        """`peer` goes on with an item of which `held` bytes are here."""
        shares = self._shares.setdefault(content, [])
        if held == 0:
            shares.clear()
        shares.append(Share(peer, held, held))
        self._at[content] = held

    def must_restart(self, content: bytes, peer: PeerId) -> bool:
        """Whether `peer` has to send an item from the start: it was wrong before.

        From then on one peer sends all of it, so that the author is known.
        """
        shares = self._shares.get(content, [])
        return content in self._suspects and any(share.peer != peer for share in shares)

    def add(self, content: bytes, piece: memoryview, transfer: Transfer) -> None:
        """Bytes of an item came."""
        self._shares[content][-1].add(piece)
        self._at[content] += piece.nbytes
        transfer.came_bytes += piece.nbytes
        self.fetched_bytes[transfer.peer] += piece.nbytes

    def finish(self, content: bytes) -> list[Share]:
        """An item is here and right. Returns shares of wrong versions of it, to be compared."""
        item = self.missing.pop(content)
        del self._at[content]
        self._finished_bytes += item.num_bytes
        self._shares.pop(content, None)
        return self._suspects.pop(content, [])

    def spoil(self, content: bytes) -> PeerId | None:
        """An item is whole and wrong: it begins anew. Returns its author if only one sent it."""
        shares = self._shares.pop(content)
        self._at[content] = 0
        authors = {share.peer for share in shares}
        if len(authors) == 1 and shares[0].start == 0:
            return authors.pop()
        self._suspects.setdefault(content, []).extend(shares)
        return None

    def missing_labels(self, contents: Iterable[bytes] | None = None) -> list[str]:
        """Names of what is missing, sorted."""
        items: Mapping[bytes, Item] = self.missing
        chosen = items if contents is None else [c for c in contents if c in items]
        return sorted(items[content].label for content in chosen)
