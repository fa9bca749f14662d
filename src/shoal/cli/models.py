"""Opening a model for a command: its source, its name on the wire, its size."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.base.content import is_hash
from shoal.base.errors import ModelUnknown
from shoal.cli.logs import progress_bar

if TYPE_CHECKING:
    from shoal.model.manifest import Manifest
    from shoal.model.source import ModelSource
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
    # No command downloads anything but `shoal model get`.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def open_given(given: str) -> ModelSource:
    """Open a model without hashing it: headers are read, weights are not.

    Raises:
        ModelError: unknown, broken or unsupported.
    """
    quiet_transformers()
    from shoal.model.source import open_source

    try:
        return open_source(given, cache_dir())
    except ModelUnknown as error:
        if is_hash(given.partition(".")[0]):
            raise ModelUnknown(
                f"model {given} is named by its hash, of which this machine has no copy: add "
                "--weights-from-peers to serve or generate, or give a directory or a file"
            ) from error
        raise


def open_model(given: str) -> OpenModel:
    """Open and hash a model; hashes are cached, so only the first time takes long.

    Raises:
        ModelError: unknown, broken or unsupported.
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
