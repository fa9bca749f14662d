"""Opening a model for a command: its source, its name on the wire, its size."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.base.content import is_hash
from shoal.base.errors import ModelUnknown
from shoal.cli.logs import progress_bar

if TYPE_CHECKING:
    from shoal.model.hub import Hub
    from shoal.model.hub_files import HubId
    from shoal.model.manifest import Manifest
    from shoal.model.source import ModelSource, Outline
    from shoal.wire.weights import FileEntry


def cache_dir() -> Path:
    """Where models are kept: $SHOAL_CACHE or the user's cache folder."""
    from shoal.model.known import default_cache_dir

    return default_cache_dir(os.environ)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenModel:
    """A model on this machine."""

    given: str
    """As the person named it."""
    source: ModelSource
    name: str
    """Its hash, which is its name on the wire."""
    num_blocks: int
    hidden_size: int
    manifest: Manifest | None = None
    is_from_peers: bool = False
    """Its tensors are in the store of fetched weights, or still to be fetched."""
    files: tuple[FileEntry, ...] = ()
    """Its tokenizer and the like, as peers offer them."""
    limit_bytes: int = 0
    """How large that store may get."""


def quiet_transformers() -> None:
    """Keep the library offline and its remarks off our output."""
    # It would ask the hub about directories too. Our own downloads come before this.
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub" in sys.modules:  # which read the environment when it was imported
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True
    _silence_transformers()


def _silence_transformers() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def fetch_model(given: str) -> Path:
    """Download a known model or one of the hub, or check what is there already.

    Gives the path of its file or directory.

    Raises:
        ModelError, ConfigError: unknown, unsupported, or it can't be downloaded; says why.
    """
    from shoal.model.hub_files import parse_hub_id
    from shoal.model.known import KNOWN_MODELS, get_model
    from shoal.model.source import unknown_model

    hub_id = None if given in KNOWN_MODELS else parse_hub_id(given)
    if hub_id is not None:
        _silence_transformers()
        with _hub() as hub:
            return hub.fetch(hub_id)
    if given not in KNOWN_MODELS:
        raise ModelUnknown(unknown_model(given))
    with progress_bar(is_bytes=True) as progress:
        return get_model(given, cache_dir(), progress)


@contextmanager
def _hub() -> Iterator[Hub]:
    from shoal.model.hub import Hub

    with progress_bar(is_bytes=True) as progress:
        yield Hub(progress=progress)


def _in_hub(given: str, look: Callable[[Hub, HubId], Path]) -> Path | None:
    """Where `look` finds a hub id; None: `given` is none, or a file or directory here."""
    from shoal.model.hub_files import parse_hub_id

    hub_id = parse_hub_id(given)
    if hub_id is None or Path(given).exists():
        return None
    _silence_transformers()
    with _hub() as hub:
        return look(hub, hub_id)


def open_given(given: str) -> ModelSource:
    """Open a model without hashing it: headers are read, weights are not.

    A hub id that is not in the hub's cache is fetched.

    Raises:
        ModelError: unknown, broken or unsupported.
        ConfigError: the hub can't be reached, or does not let us in.
    """
    # Before the library is kept offline.
    directory = _in_hub(given, lambda hub, hub_id: hub.resolve(hub_id))
    quiet_transformers()
    from shoal.model.source import open_source

    try:
        return open_source(directory or given, cache_dir())
    except ModelUnknown as error:
        if is_hash(given.partition(".")[0]):
            raise ModelUnknown(
                f"model {given} is named by its hash, of which this machine has no copy: add "
                "--weights-from-peers to serve or generate, or give a directory or a file"
            ) from error
        raise


def open_outline(given: str) -> Outline:
    """Open what a model is without what it weighs: of a hub id, weights are not fetched.

    Raises:
        ModelError, ConfigError: as `open_given`.
    """
    directory = _in_hub(given, lambda hub, hub_id: hub.preview(hub_id))
    if directory is None:
        return open_given(given)
    quiet_transformers()
    from shoal.model.safetensors_source import SavedOutline

    return SavedOutline(directory)


def open_model(given: str) -> OpenModel:
    """Open and hash a model; hashes are cached, so only the first time takes long.

    Raises:
        ModelError: unknown, broken or unsupported.
        ConfigError: the hub can't be reached, or does not let us in.
    """
    source = open_given(given)
    from shoal.model.manifest import build_manifest
    from shoal.model.span_model import num_blocks

    with progress_bar(is_bytes=True) as progress:
        manifest = build_manifest(source, cache_dir(), progress)
    return OpenModel(
        given=given,
        source=source,
        name=manifest.model_name(),
        num_blocks=num_blocks(source.config),
        hidden_size=int(source.config.hidden_size),
        manifest=manifest,
    )
