"""A backend that can be replaced by another one while it serves: how a server changes its span.

`SwitchingBackend` is a BlockBackend made of one or two others. Sequences opened from now on go
to the newest that has their blocks; each sequence stays where it was opened, until it is closed.
What it is comes from `shoal.server.moving`, which decides when to add and when to drop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shoal.base.adapters import AdapterId, AdapterManifest, AdapterPart
from shoal.base.backend import BackendFacts, BlockBackend, Call, Outcome, SequenceId
from shoal.base.errors import AdapterMissing, BadInput, ConfigError, InternalError
from shoal.base.spans import Span
from shoal.base.training import BlockTrainer


class SwitchingBackend:
    """Runs the newest of its backends, and an older one while sequences live there.

    As with every backend, all methods but `run` are called only while no `run` is in
    progress; `add` and `drop_old` are no exception.
    """

    def __init__(self, backend: BlockBackend) -> None:
        self._newest = backend
        self._old: BlockBackend | None = None
        self._at: dict[SequenceId, BlockBackend] = {}
        """Where each open sequence lives."""

    @property
    def facts(self) -> BackendFacts:
        """What the newest is: the cache of an old one is no part of it."""
        return self._newest.facts

    @property
    def newest(self) -> BlockBackend:
        """Where sequences are opened."""
        return self._newest

    @property
    def old_facts(self) -> BackendFacts | None:
        """What the old one is; None when there is none."""
        return None if self._old is None else self._old.facts

    @property
    def is_old_used(self) -> bool:
        """Whether sequences live in the old one."""
        return any(backend is self._old for backend in self._at.values())

    def add(self, backend: BlockBackend) -> None:
        """Make `backend` the newest; the one until now becomes the old one.

        Raises:
            ConfigError: it differs in what a server can't change (`check_alike`).
            InternalError: the old one before was not dropped yet.
        """
        if self._old is not None:
            raise InternalError(f"blocks {self._old.facts.span} are still served; drop them first")
        check_alike(self.facts, backend.facts)
        self._old, self._newest = self._newest, backend

    async def drop_old(self) -> None:
        """Free the old one.

        Raises:
            InternalError: sequences live there.
        """
        if self.is_old_used:
            raise InternalError("sequences of the old blocks are still open")
        if self._old is not None:
            old, self._old = self._old, None
            await old.aclose()

    def open(self, sequence: SequenceId, span: Span, adapter: AdapterId | None = None) -> None:
        """Start an empty sequence over `span` at the newest that has it.

        Adapters don't move: one that was loaded before the newest came is not there.

        Raises:
            BadInput: none has it (any more).
            AdapterMissing: only the old one has the blocks, and the adapter came after it.
        """
        self._check_new(sequence)
        home = next((one for one in self._backends() if one.facts.span.covers(span)), None)
        if home is None:
            raise BadInput(f"blocks {span} are not served here (we have {self.facts.span})")
        if home is self._old and adapter is not None and not home.holds_adapter(adapter):
            raise AdapterMissing(f"blocks {span} are being left here, and take no new adapters")
        home.open(sequence, span, adapter)
        self._at[sequence] = home

    def close(self, sequence: SequenceId) -> None:
        """Free the sequence's cache."""
        home = self._at.pop(sequence, None)
        if home is not None:
            home.close(sequence)

    def truncate(self, sequence: SequenceId, length: int) -> int:
        """Forget positions >= `length`; returns the length that is left."""
        return self._home(sequence).truncate(sequence, length)

    def fork(self, parent: SequenceId, child: SequenceId, length: int) -> int:
        """Open `child` as a copy of the parent's first positions, where the parent lives."""
        self._check_new(child)
        home = self._home(parent)
        actual = home.fork(parent, child, length)
        self._at[child] = home
        return actual

    async def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Run all calls, one outcome each, in order.

        One backend after the other: two that computed at once would take each other's cores.
        """
        outcomes: list[Outcome] = [InternalError("not run")] * len(calls)
        homes = [self._home(call.sequence) for call in calls]
        for backend in self._backends():
            mine = [index for index, home in enumerate(homes) if home is backend]
            if not mine:
                continue
            done = await backend.run([calls[index] for index in mine])
            for index, outcome in zip(mine, done, strict=True):
                outcomes[index] = outcome
        return outcomes

    def check_adapter(self, manifest: AdapterManifest) -> None:
        """See that an adapter fits the newest's blocks."""
        self._newest.check_adapter(manifest)

    async def load_adapter(self, adapter: AdapterId, part: AdapterPart) -> None:
        """Hold an adapter's tensors in the newest's blocks."""
        await self._newest.load_adapter(adapter, part)

    async def drop_adapter(self, adapter: AdapterId) -> None:
        """Free it, wherever it was loaded."""
        for backend in self._backends():
            await backend.drop_adapter(adapter)

    def holds_adapter(self, adapter: AdapterId) -> bool:
        """Whether the newest has it."""
        return self._newest.holds_adapter(adapter)

    def trainer(self) -> BlockTrainer | None:
        """The newest's: passes over blocks that we leave go elsewhere."""
        return self._newest.trainer()

    async def aclose(self) -> None:
        """Close both."""
        self._at.clear()
        for backend in self._backends():
            await backend.aclose()

    def _backends(self) -> list[BlockBackend]:
        """The newest first."""
        return [self._newest] if self._old is None else [self._newest, self._old]

    def _check_new(self, sequence: SequenceId) -> None:
        if sequence in self._at:
            raise InternalError(f"sequence {sequence} is open already")

    def _home(self, sequence: SequenceId) -> BlockBackend:
        home = self._at.get(sequence)
        if home is None:
            raise InternalError(f"sequence {sequence} is not open")
        return home


def check_alike(old: BackendFacts, new: BackendFacts) -> None:
    """See that a server may go from one backend to the other while it serves.

    Blocks, their numerics and the cache's size may change: every record tells them. The rest
    was told to clients once.

    Raises:
        ConfigError: names what differs.
    """
    same = dataclasses.replace(
        new,
        span=old.span,
        numerics=old.numerics,
        is_exact=old.is_exact,
        cache_tokens=old.cache_tokens,
    )
    names = [field.name for field in dataclasses.fields(BackendFacts)]
    differ = [name for name in names if getattr(same, name) != getattr(old, name)]
    if differ:
        raise ConfigError(
            f"a server can't go from blocks {old.span} to {new.span} while it serves: "
            f"{', '.join(differ)} would change (start a new server for that)"
        )
