"""What this machine can hand out of one model: tensors, side files, the manifest, by hash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shoal.base.content import content_hash
from shoal.base.limits import FILES_BYTES_MAX
from shoal.model.manifest import Manifest
from shoal.model.manifest_text import stored_num_bytes
from shoal.model.source import ModelSource


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file beside the weights."""

    name: str
    data: bytes
    content: str


class ModelShelf:
    """A model's source, read by content hash. Safe to use from several threads.

    The originals are handed out, whatever the server made of them (quantised, bfloat16):
    they are what the manifest names.
    """

    def __init__(
        self, source: ModelSource, manifest: Manifest, holds: Callable[[str], bool] | None = None
    ) -> None:
        """`holds` says which tensors are here by name; None: all of them."""
        self._source = source
        self._manifest = manifest
        self._holds = holds or (lambda name: True)
        self.text = manifest.text()
        self.model = manifest.model_name()
        self._by_content: Mapping[str, tuple[str, int]] = {
            entry.content: (entry.name, stored_num_bytes(entry.shape, entry.dtype))
            for entry in manifest.tensors
        }
        self._side_files: tuple[SideFile, ...] = ()

    def held(self) -> list[bool]:
        """For each tensor of the manifest whether it is here."""
        return [self._holds(entry.name) for entry in self._manifest.tensors]

    def side_files(self) -> tuple[SideFile, ...]:
        """The files beside the weights; none if they are too large together.

        Read once, when there are any: a source from peers gets them later.
        """
        if not self._side_files:
            files = self._source.side_files()
            if sum(len(data) for data in files.values()) > FILES_BYTES_MAX:
                files = {}
            self._side_files = tuple(
                SideFile(name=name, data=data, content=content_hash(data))
                for name, data in sorted(files.items())
            )
        return self._side_files

    def read(self, content: str, start: int, count: int) -> bytes | None:
        """Bytes of what has this hash; None: not here, or not so long.

        Raises:
            ModelCorrupt: its file is broken.
        """
        data = self._in_memory(content)
        if data is not None:
            return data[start : start + count] if start + count <= len(data) else None
        name, num_bytes = self._by_content.get(content, ("", 0))
        if not name or start + count > num_bytes or not self._holds(name):
            return None
        return self._source.read_stored(name, start, count)

    def _in_memory(self, content: str) -> bytes | None:
        if content == self.model:
            return self.text
        return next((f.data for f in self.side_files() if f.content == content), None)
