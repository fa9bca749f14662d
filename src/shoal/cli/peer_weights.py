"""`--weights-from-peers`: a model of which this machine has no copy.

Its name leads to its manifest, that to config and hashes; then exactly the tensors that are
needed are fetched into the local store, each checked against its hash.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.base.content import files_hash, is_hash
from shoal.base.errors import ConfigError, ModelUnknown, WeightsMissing
from shoal.base.ids import PeerId, short
from shoal.base.spans import Span
from shoal.cli.joining import SwarmChoice, Visitor, visit
from shoal.cli.logs import progress_bar
from shoal.cli.models import OpenModel, cache_dir, quiet_transformers
from shoal.cli.shelves import ThreadedStore
from shoal.cli.sizes import size_text
from shoal.client.weight_fetch import FetchReport, WeightFetch
from shoal.client.weight_ledger import Item
from shoal.client.weight_sources import Dial, Place, Survey, choose_files, fetch_manifest, survey
from shoal.discovery.directory import Snapshot
from shoal.model.known import KNOWN_MODELS
from shoal.model.manifest_text import parse_manifest
from shoal.model.span_model import num_blocks, span_tensor_names
from shoal.model.store_source import StoreSource
from shoal.model.wanted import head_tensor_names
from shoal.model.weight_store import WeightStore
from shoal.net.address import Address, parse_address
from shoal.net.channel import PURPOSE_WEIGHTS, Channel, open_channel
from shoal.net.membership import SwarmPass
from shoal.net.transport import Transport
from shoal.wire.weights import FileEntry

logger = logging.getLogger(__name__)

ASKED_MAX: Final = 32
"""Peers that are asked what they have, before anything is fetched."""

PREFIX_CHARS_MIN: Final = 6
"""Letters of a hash that are enough to name a model of this swarm."""


@dataclass(frozen=True, slots=True)
class Swarm:
    """How peers are reached: handed from whoever joined."""

    transport: Transport
    swarm_pass: SwarmPass
    snapshot: Callable[[], Snapshot]

    def dialler(self) -> Dial:
        """Opens weights channels."""

        async def dial(address: Address) -> Channel:
            return await open_channel(self.transport, address, PURPOSE_WEIGHTS, self.swarm_pass)

        return dial

    def places(self, model: str, span: Span | None = None) -> list[Place]:
        """Who serves the model, besides ourselves: first those with blocks of `span`.

        Otherwise in an order of chance: not everybody should ask the same few.
        """
        found = [
            one.record
            for one in self.snapshot().records
            if one.record.model == model and one.record.peer != self.transport.peer
        ]
        random.SystemRandom().shuffle(found)
        if span is not None:
            found.sort(key=lambda record: record.start >= span.end or record.end <= span.start)
        return [
            Place(PeerId(record.peer), tuple(parse_address(text) for text in record.addresses))
            for record in found
        ]


def weight_store() -> WeightStore:
    """Where fetched weights are kept: a folder of the cache."""
    return WeightStore(cache_dir() / "weights")


def resolve_model(given: str, served: Sequence[str]) -> tuple[str, str | None]:
    """The hash of a model, and of its tokenizer files if they were named too.

    `given` is a hash, the beginning of one that the swarm serves, or a known name; behind a
    dot the hash of a set of files may follow.

    Raises:
        ModelUnknown: nothing of that name; lists what the swarm serves.
        ConfigError: several models begin so, or a malformed hash.
    """
    base, dot, files = given.partition(".")
    if given in KNOWN_MODELS:
        return KNOWN_MODELS[given].model, None
    if dot and not is_hash(files):
        base = given  # a file name, not a hash; falls through to the message below
    if is_hash(base):
        return base, files or None
    is_prefix = len(base) >= PREFIX_CHARS_MIN and set(base) <= set("0123456789abcdef")
    found = [name for name in served if is_prefix and name.startswith(base)]
    if len(found) > 1:
        raise ConfigError(f"several models begin with {base}: {', '.join(found)}; write more of it")
    if found:
        return found[0], files or None
    listed = ", ".join(served) or "nothing"
    raise ModelUnknown(
        f"no model {given!r}: with --weights-from-peers, MODEL is a model's hash, its first "
        f"{PREFIX_CHARS_MIN} letters or more, or a known name ({', '.join(sorted(KNOWN_MODELS))}). "
        f"This swarm serves: {listed}"
    )


async def find_model(given: str, choice: SwarmChoice, limit_bytes: int) -> OpenModel:
    """For a server: the model's manifest, config and list of files; no tensor yet.

    A server hands its tokenizer on but needs none: if peers don't agree on one, it goes without.

    Raises:
        ModelError, ConfigError, PeerError: it can't be found; says why.
    """
    async with visit(choice) as visitor:
        swarm = _swarm_of(visitor)
        name, wanted = resolve_model(given, swarm.snapshot().models())
        asked = await survey(name, swarm.dialler(), swarm.places(name)[:ASKED_MAX])
        text = await _manifest_text(name, swarm, asked)
    files: list[FileEntry] = []
    try:
        files = choose_files(name, asked, wanted)
    except (ConfigError, WeightsMissing) as error:
        if wanted is not None:
            raise
        logger.warning("no tokenizer is handed on reason=%s", error)
    return _opened(given, name, text, files, limit_bytes)


async def open_from(
    name: str, swarm: Swarm, places: Sequence[Place], limit_bytes: int
) -> OpenModel:
    """For a node of a ring: the model of this hash, as the named peers have it; no tensor yet.

    Raises:
        ModelError, PeerError: none of them has it; says why.
    """
    asked = await survey(name, swarm.dialler(), places)
    return _opened(name, name, await _manifest_text(name, swarm, asked), (), limit_bytes)


async def fetch_for_client(
    given: str, choice: SwarmChoice, limit_bytes: int, *, is_thin: bool = False
) -> OpenModel:
    """For a client: config, tokenizer, embedding, norm and head; for a thin one no weights.

    Raises:
        ModelError, ConfigError, PeerError: it can't be had; says why.
    """
    async with visit(choice) as visitor:
        swarm = _swarm_of(visitor)
        name, wanted = resolve_model(given, swarm.snapshot().models())
        asked = await survey(name, swarm.dialler(), swarm.places(name)[:ASKED_MAX])
        text = await _manifest_text(name, swarm, asked)
        opened = _opened(given, name, text, choose_files(name, asked, wanted), limit_bytes)
        items = _items(opened, () if is_thin else head_tensor_names(opened.source))
        with weight_store().pinned(item.content.hex() for item in items):
            await fetch_items(opened, items, swarm)
    return opened


async def _manifest_text(name: str, swarm: Swarm, asked: Survey) -> bytes:
    store = weight_store()
    text = store.manifest_text(name)
    if text is None:
        text = await fetch_manifest(name, swarm.dialler(), asked)
        store.save_manifest(text)
    return text


def span_items(model: OpenModel, span: Span) -> list[Item]:
    """What a server of `span` fetches: its tensors, and the files it hands on."""
    return _items(model, span_tensor_names(model.source, span))


def head_items(model: OpenModel) -> list[Item]:
    """What a server that answers thin clients fetches besides: embedding, norm and head."""
    return _items(model, head_tensor_names(model.source))


async def fetch_items(
    model: OpenModel, items: Sequence[Item], swarm: Swarm, span: Span | None = None
) -> None:
    """Get what is not in the store yet; says on stderr what came from whom.

    Peers with blocks of `span` are asked first.

    Raises:
        WeightsMissing: no peer has it; names it.
        ConfigError: the disk or the limit is too small.
    """
    store = weight_store()
    missing = [one for one in items if not store.has(one.content.hex(), one.num_bytes)]
    if missing:
        needed = {one.content.hex(): one.num_bytes for one in items}
        store.make_room(needed, model.limit_bytes)
        report = await _fetch(model, missing, store, lambda: swarm.places(model.name, span), swarm)
        print(report_text(report), file=sys.stderr, flush=True)
    if model.files:
        _source(model).use_files(_file_folder(store, model.files))


async def _fetch(
    model: OpenModel,
    missing: Sequence[Item],
    store: WeightStore,
    places: Callable[[], Sequence[Place]],
    swarm: Swarm,
) -> FetchReport:
    with progress_bar(is_bytes=True) as show:
        fetch = WeightFetch(
            model.name,
            missing,
            swarm.dialler(),
            places,
            ThreadedStore(store),
            lambda done, total: show("fetching weights", done, total),
        )
        return await fetch.run()


def report_text(report: FetchReport) -> str:
    """What came from whom, and who was dropped."""
    total = sum(report.fetched_bytes.values())
    by_peer = sorted(report.fetched_bytes.items(), key=lambda one: -one[1])
    listed = ", ".join(f"{short(peer)} {size_text(count)}" for peer, count in by_peer)
    text = f"fetched {report.num_items} tensors and files, {size_text(total)} ({total} bytes)"
    if listed:
        text += f", from {len(by_peer)} peer{'s' if len(by_peer) > 1 else ''}: {listed}"
    for peer, reason in report.dropped.items():
        text += f"\ndropped {short(peer)}: {reason}"
    return text


def _swarm_of(visitor: Visitor) -> Swarm:
    return Swarm(visitor.transport, visitor.swarm_pass, visitor.directory.snapshot)


def _opened(
    given: str, name: str, text: bytes, files: Sequence[FileEntry], limit_bytes: int
) -> OpenModel:
    quiet_transformers()
    manifest = parse_manifest(text, name)
    source = StoreSource(manifest, weight_store())
    return OpenModel(
        given=given,
        source=source,
        name=name,
        num_blocks=num_blocks(source.config),
        hidden_size=int(source.config.hidden_size),
        manifest=manifest,
        is_from_peers=True,
        files=tuple(files),
        limit_bytes=limit_bytes,
    )


def _source(model: OpenModel) -> StoreSource:
    if not isinstance(model.source, StoreSource):
        raise TypeError("this model does not come from peers")
    return model.source


def _items(model: OpenModel, names: Iterable[str]) -> list[Item]:
    """The named tensors, and the model's files."""
    source, wanted = _source(model), set(names)
    tensors = [
        Item(
            content=bytes.fromhex(source.entry(name).content),
            num_bytes=source.num_bytes(name),
            label=name,
            index=index,
        )
        for index, name in enumerate(source.tensor_names())
        if name in wanted
    ]
    files = [
        Item(content=one.content, num_bytes=one.num_bytes, label=one.name) for one in model.files
    ]
    return tensors + files


def _file_folder(store: WeightStore, files: Sequence[FileEntry]) -> Path:
    name = files_hash((one.name, one.num_bytes, one.content.hex()) for one in files)
    return store.file_folder(name, {one.name: (one.content.hex(), one.num_bytes) for one in files})
