"""Asking around: who has what of a model, what its manifest says, which files belong to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.base.content import SIDE_FILES, files_hash, manifest_hash
from shoal.base.errors import (
    ConfigError,
    PeerMisbehaved,
    PeerUnreachable,
    ProtocolError,
    ShoalError,
    WeightsMissing,
)
from shoal.base.ids import PeerId, short
from shoal.base.limits import FILES_BYTES_MAX
from shoal.client.weight_stream import WeightStream, wishes
from shoal.net.address import Address
from shoal.net.channel import Channel
from shoal.plan.fetching import files_on_offer
from shoal.wire.weights import FileEntry, Holdings

logger = logging.getLogger(__name__)

ASKED_MAX: Final = 16
"""Peers asked at once: dialling is a burst of public-key work."""

Dial = Callable[[Address], Awaitable[Channel]]
"""Opens a weights channel to an address."""


@dataclass(frozen=True, slots=True)
class Place:
    """A peer that serves the model, and where it can be dialled."""

    peer: PeerId
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What peers said about a model."""

    found: Mapping[Place, Holdings]
    failures: Mapping[PeerId, ShoalError] = field(default_factory=dict)

    def reasons(self) -> str:
        """Why the others said nothing, for people."""
        return "; ".join(f"{short(peer)}: {why}" for peer, why in self.failures.items())


async def open_stream(dial: Dial, place: Place) -> WeightStream:
    """A stream to a peer at the first of its addresses that answers.

    Raises:
        PeerError, ProtocolError: none does; the last one's reason.
    """
    error: ShoalError = PeerUnreachable(f"no address of {short(place.peer)}")
    for address in place.addresses:
        try:
            return WeightStream(await dial(address))
        except ShoalError as failure:
            error = failure
    raise error


async def survey(model: str, dial: Dial, places: Sequence[Place]) -> Survey:
    """Ask everybody what they have; who does not answer is left out, with its reason."""
    found: dict[Place, Holdings] = {}
    failures: dict[PeerId, ShoalError] = {}
    slots = asyncio.Semaphore(ASKED_MAX)

    async def ask(place: Place) -> None:
        async with slots:
            try:
                stream = await open_stream(dial, place)
                try:
                    found[place] = await stream.holdings(bytes.fromhex(model))
                finally:
                    stream.close()
            except ShoalError as error:
                failures[place.peer] = error

    async with asyncio.TaskGroup() as group:
        for place in places:
            group.create_task(ask(place))
    in_order = {place: found[place] for place in places if place in found}
    return Survey(found=in_order, failures=failures)


async def fetch_manifest(model: str, dial: Dial, asked: Survey) -> bytes:
    """The text of the model's manifest, checked against the model's name.

    Raises:
        WeightsMissing: nobody gives it; says why.
    """
    failures = dict(asked.failures)
    for place, holdings in asked.found.items():
        try:
            return await _manifest_from(model, dial, place, holdings)
        except ShoalError as error:
            failures[place.peer] = error
            if isinstance(error, PeerMisbehaved | ProtocolError):
                logger.warning("peer dropped peer=%s reason=%s", short(place.peer), error)
    reasons = Survey(found={}, failures=failures).reasons() or "nobody serves this model"
    raise WeightsMissing(f"no peer gives the manifest of model {model}: {reasons}")


async def _manifest_from(model: str, dial: Dial, place: Place, holdings: Holdings) -> bytes:
    stream = await open_stream(dial, place)
    text = bytearray()
    try:
        parts = wishes(bytes.fromhex(model), 0, holdings.manifest_bytes)
        async for _, piece in stream.pieces(parts):
            text += piece
    finally:
        stream.close()
    if manifest_hash(bytes(text)) != model:
        raise PeerMisbehaved(f"{short(place.peer)} sent a manifest that is not model {model}'s")
    return bytes(text)


def choose_files(model: str, asked: Survey, wanted: str | None) -> list[FileEntry]:
    """The side files (tokenizer and the like) that the peers offer for a model.

    The model's name does not cover them. So all peers must offer the same, or the caller
    must have named the set that it trusts (`wanted`, as `files_hash` names it).

    Raises:
        ConfigError: peers offer different ones and none was named; lists them.
        WeightsMissing: nobody offers any, or not the wanted ones.
    """
    sets: dict[str, list[FileEntry]] = {}
    offers: dict[PeerId, str] = {}
    for place, holdings in asked.found.items():
        name = _files_name(holdings.files)
        if name is None:
            continue
        offers[place.peer] = name
        sets[name] = sorted(holdings.files, key=lambda one: one.name)
    by_name = files_on_offer(offers)
    if wanted is not None:
        if wanted in sets:
            return sets[wanted]
        raise WeightsMissing(f"no peer offers the tokenizer files {wanted} of model {model}")
    if not by_name:
        why = asked.reasons()
        raise WeightsMissing(
            f"no peer offers the tokenizer of model {model}" + (f" ({why})" if why else "")
        )
    if len(by_name) > 1:
        listed = "; ".join(
            f"{model}.{name} ({', '.join(short(peer) for peer in peers)})"
            for name, peers in by_name.items()
        )
        raise ConfigError(
            f"peers offer different tokenizer files for this model: give the one you trust as "
            f"MODEL: {listed}"
        )
    return sets[next(iter(by_name))]


def _files_name(files: Sequence[FileEntry]) -> str | None:
    """What a set of files is named by; None: none, or none that can be taken."""
    names = [one.name for one in files]
    if not files or len(set(names)) != len(names) or not SIDE_FILES.issuperset(names):
        return None
    if sum(one.num_bytes for one in files) > FILES_BYTES_MAX:
        return None
    return files_hash((one.name, one.num_bytes, one.content.hex()) for one in files)
