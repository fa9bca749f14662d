"""A model's name: the hash of its manifest.

The manifest is the source's identity (what the files say about the architecture) and a
table of every tensor: name, shape, stored type, content hash. The model's name is the hash
of the manifest, so two peers that say the same name hold the same weights.

Rule for who hashes what: building the manifest streams all weights once per machine
(about 1 GB/s); content hashes are kept in the cache directory under (path, size,
modification time) of the weight files, so every later start is free. A server that has
only some tensors takes the manifest from elsewhere, checks that it hashes to the model's
name, and hashes just its own tensors with `check_tensors`.

The stored bytes are hashed: a GGUF file and the safetensors it was made from are different
models, and so are two quantisations, because they compute different things.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.base.content import content_digest, manifest_hash
from shoal.base.errors import ModelCorrupt
from shoal.model.known import Progress
from shoal.model.source import ModelSource

_log = logging.getLogger(__name__)

_FORMAT: Final = "shoal-manifest-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a manifest."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    content: str
    """Hash of the stored bytes, 32 hex characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A model described so that its name can be checked."""

    identity: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    """Sorted by name."""

    def text(self) -> bytes:
        """The manifest as it is hashed and as it travels: JSON in one fixed form."""
        rows = [[t.name, list(t.shape), t.dtype, t.content] for t in self.tensors]
        text = json.dumps(
            [_FORMAT, dict(self.identity), rows], sort_keys=True, separators=(",", ":")
        )
        return text.encode()

    def model_name(self) -> str:
        """The model's name on the wire: 32 hex characters."""
        return manifest_hash(self.text())


def model_hash(
    source: ModelSource, cache_dir: Path | None = None, progress: Progress | None = None
) -> str:
    """The model's name: 32 hex characters. See `build_manifest`."""
    return build_manifest(source, cache_dir, progress).model_name()


def build_manifest(
    source: ModelSource, cache_dir: Path | None = None, progress: Progress | None = None
) -> Manifest:
    """The manifest of all of `source`; streams the weights unless `cache_dir` has the hashes.

    A source out of the store has one already, and perhaps not all of the weights.
    """
    known = getattr(source, "manifest", None)
    if isinstance(known, Manifest):
        return known
    cache = _cache_file(source.files, cache_dir)
    names = list(source.tensor_names())
    contents = None if cache is None else _read_cache(cache, names)
    if contents is None:
        contents = _hash_tensors(source, names, progress)
        if cache is not None:
            _write_cache(cache, contents)
    entries = []
    for name in sorted(names):
        stored = source.stored(name)
        entries.append(
            TensorEntry(name=name, shape=stored.shape, dtype=stored.dtype, content=contents[name])
        )
    return Manifest(identity=source.identity, tensors=tuple(entries))


def check_tensors(source: ModelSource, manifest: Manifest, names: Iterable[str]) -> None:
    """Hash the named tensors and compare them with the manifest.

    Raises:
        ModelCorrupt: a tensor differs, or the manifest doesn't know it.
    """
    expected = {entry.name: entry.content for entry in manifest.tensors}
    for name in names:
        if expected.get(name) != _hash_tensor(source, name):
            raise ModelCorrupt(f"{name} is not the tensor that the model's manifest names")


def _hash_tensor(
    source: ModelSource, name: str, hashed: Callable[[int], None] | None = None
) -> str:
    digest = content_digest()
    for piece in source.stored_bytes(name):
        digest.update(piece)
        if hashed is not None:
            hashed(piece.nbytes)
    return str(digest.hexdigest())


def _hash_tensors(
    source: ModelSource, names: list[str], progress: Progress | None
) -> dict[str, str]:
    total = sum(path.stat().st_size for path in source.files)
    done = 0

    def hashed(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress("hashing", done, total)

    return {name: _hash_tensor(source, name, hashed) for name in names}


def _cache_file(files: tuple[Path, ...], cache_dir: Path | None) -> Path | None:
    if cache_dir is None or not files:
        return None
    stamps = []
    for path in files:
        status = path.stat()
        stamps.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return cache_dir / "manifests" / f"{manifest_hash(json.dumps(stamps).encode())}.json"


def _read_cache(path: Path, names: list[str]) -> dict[str, str] | None:
    """The cached hashes; None when there are none or they are not for these tensors."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        _log.warning("manifest cache %s cannot be read (%s): hashing again", path, error)
        return None
    if not isinstance(contents, dict) or set(contents) != set(names):
        _log.warning("manifest cache %s is for other tensors: hashing again", path)
        return None
    return contents


def _write_cache(path: Path, contents: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as output:
            json.dump(contents, output)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
