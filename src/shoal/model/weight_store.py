"""The local store of weights that came from peers: tensors and files by content hash.

```
content/ab/abcd...   whole, checked before it got this name
partial/abcd...      begun; its length is how far it is. Locked while somebody writes it
manifests/NAME       the text of a model's manifest
files/HASH/          the tokenizer and config files of one model under their own names
pins/*.pin           what a running process needs; locked as long as it lives
lock                 held for the moment of pinning or making room
```

Processes share a store: finished files appear by an atomic rename, locks vanish with their
process. Names are hashes that we computed or asked for, never a peer's words, and no symbolic
link is followed. No torch, no network here; calls block, for a moment or as long as the disk
takes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from shoal.base.content import SIDE_FILES, content_digest, content_hash, is_hash, manifest_hash
from shoal.base.errors import ConfigError, ModelCorrupt
from shoal.model.weight_draft import (
    NO_LINKS,
    Draft,
    can_lock,
    not_writable,
    open_draft,
    remove_abandoned,
)

_log = logging.getLogger(__name__)

CACHE_BYTES: Final = 50 << 30
"""Default limit of the store: a third of a 70-billion-parameter model in bf16."""

_READ_BYTES: Final = 16 << 20


class WeightStore:
    """A store in one folder, made when it is first written to."""

    def __init__(self, root: Path) -> None:
        self._root = root

    # --- finished content ------------------------------------------------------------

    def num_bytes(self, content: str) -> int | None:
        """Size of a finished tensor or file; None: not here."""
        try:
            status = os.lstat(self._path(content))
        except FileNotFoundError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def has(self, content: str, num_bytes: int) -> bool:
        """Whether it is here as a whole, with this size."""
        return self.num_bytes(content) == num_bytes

    def read(self, content: str, start: int, count: int) -> bytes | None:
        """Up to `count` bytes from `start`; None: not here."""
        handle = self._open(content)
        if handle is None:
            return None
        with os.fdopen(handle, "rb") as file:
            file.seek(start)
            return file.read(count)

    def read_into(self, content: str, target: memoryview) -> None:
        """Fill `target` with the whole of it, checked against its hash on the way.

        Raises:
            ModelCorrupt: it is not here, or its bytes have changed; they are removed.
        """
        handle = self._open(content)
        if handle is None:
            raise ModelCorrupt(f"{content} is not in {self._root}: fetch the weights again")
        digest, done = content_digest(), 0
        with os.fdopen(handle, "rb", buffering=0) as file:
            while done < target.nbytes:
                count = file.readinto(target[done : done + _READ_BYTES])
                if not count:
                    break
                digest.update(target[done : done + count])
                done += count
        if done < target.nbytes or digest.hexdigest() != content:
            self._path(content).unlink(missing_ok=True)
            raise ModelCorrupt(
                f"{content} in {self._root} has changed since it was fetched; it was removed: "
                "start again to fetch it anew"
            )
        self._touch(content)

    def _open(self, content: str) -> int | None:
        try:
            return os.open(self._path(content), os.O_RDONLY | NO_LINKS)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None  # a link: not ours
            raise

    def _touch(self, content: str) -> None:
        with suppress(FileNotFoundError):
            os.utime(self._path(content), follow_symlinks=False)

    def _path(self, content: str) -> Path:
        _check_name(content)
        return self._root / "content" / content[:2] / content

    # --- unfinished content ----------------------------------------------------------

    def begin(self, content: str, num_bytes: int) -> Draft:
        """Go on with what was begun, or begin: reads and hashes what is held already.

        A draft that another process writes is left to it; ours then begins from nothing.

        Raises:
            ConfigError: the disk can't be written to.
        """
        _check_name(content)
        folder = self._root / "partial"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            target = self._path(content)
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, path = open_draft(folder, content)
        except OSError as error:
            raise not_writable(self._root, error) from error
        return Draft(handle, path, target, num_bytes)

    # --- manifests and side files ------------------------------------------------------

    def manifest_text(self, model: str) -> bytes | None:
        """The text of a manifest that was saved here; None: not here, or altered."""
        _check_name(model)
        try:
            text = (self._root / "manifests" / model).read_bytes()
        except FileNotFoundError:
            return None
        return text if manifest_hash(text) == model else None

    def save_manifest(self, text: bytes) -> None:
        """Keep a manifest under its hash."""
        with self._new_file(self._root / "manifests" / manifest_hash(text)) as file:
            file.write(text)

    def file_folder(self, name: str, files: Mapping[str, tuple[str, int]]) -> Path:
        """A folder with these files (content hash, bytes) under their own names.

        `name` is what the set of files is named by (`base.content.files_hash`).

        Raises:
            ModelCorrupt: one is not in the store.
            ConfigError: a name that no side file has.
        """
        _check_name(name)
        folder = self._root / "files" / name
        if _is_whole(folder, files):
            return folder
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
        try:
            for file_name, (content, num_bytes) in files.items():
                if file_name not in SIDE_FILES:
                    raise ConfigError(f"{file_name!r} is no file that belongs to a model")
                data = bytearray(num_bytes)
                self.read_into(content, memoryview(data))
                (scratch / file_name).write_bytes(data)
            if folder.exists():
                shutil.rmtree(folder)
            with suppress(FileExistsError):
                scratch.rename(folder)
        except OSError as error:
            if not _is_whole(folder, files):  # else another process was quicker
                raise not_writable(self._root, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return folder

    @contextmanager
    def _new_file(self, path: Path) -> Iterator[Any]:
        """A file that appears under its name when it is whole."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        except OSError as error:
            raise not_writable(self._root, error) from error
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise

    # --- room ------------------------------------------------------------------------------

    @contextmanager
    def pinned(self, contents: Iterable[str]) -> Iterator[None]:
        """Nobody removes these while the context is open; it ends with the process."""
        folder = self._root / "pins"
        path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.pin"
        contents = sorted(contents)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._alone():
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o600)
                fcntl.flock(handle, fcntl.LOCK_EX)
                os.write(handle, json.dumps(contents).encode())
        except OSError as error:
            raise not_writable(self._root, error) from error
        try:
            for content in contents:
                self._touch(content)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)

    def make_room(self, needed: Mapping[str, int], limit_bytes: int) -> int:
        """Remove what was not used for longest until `needed` (content to bytes) fits as well.

        What a living process pinned stays, and so do drafts of what is needed. Returns how
        many bytes of `needed` are still to be fetched.

        Raises:
            ConfigError: it can't fit; the message says into what, and what to change.
        """
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._alone():
            pinned = self._pins()
            held = self._held()
            missing = sum(
                size for content, size in needed.items() if held.get(content, _NOTHING)[1] != size
            )
            drafts = {path.name: size for path, size, _ in self._drafts()}
            begun = sum(size for name, size in drafts.items() if name in needed)
            used = sum(size for _, size, _ in held.values()) + sum(drafts.values())
            over = used - begun + missing - limit_bytes
            self._remove_oldest(over, held, pinned | set(needed), needed)
        free = shutil.disk_usage(self._root).free + begun
        if free < missing:
            raise ConfigError(
                f"{self._root} has {free / 1e9:.2f} GB free, {missing / 1e9:.2f} GB are needed: "
                "make room, or set SHOAL_CACHE to a folder on another disk"
            )
        return max(0, missing - begun)

    def _remove_oldest(
        self, over: int, held: _Held, kept: Collection[str], needed: Mapping[str, int]
    ) -> None:
        if over <= 0:
            return
        removable = [(used_s, size, path) for name, (path, size, used_s) in held.items()
                     if name not in kept]  # fmt: skip
        removable += [(used_s, size, path) for path, size, used_s in self._drafts()
                      if path.name not in needed]  # fmt: skip
        room = sum(size for _, size, _ in removable)
        if room < over:
            raise ConfigError(
                f"the cache of weights would grow {(over - room) / 1e9:.3f} GB over its limit, "
                "although nothing is kept in it that is not in use: raise --cache-limit, or "
                "serve fewer blocks"
            )
        for _, size, path in sorted(removable, key=lambda one: (one[0], str(one[2]))):
            if over <= 0:
                return
            if path.parent.name == "partial":
                if not remove_abandoned(path):
                    continue
            else:
                path.unlink(missing_ok=True)
            _log.info("weights removed content=%s bytes=%d", path.name, size)
            over -= size

    def _held(self) -> _Held:
        """Finished content: path, bytes, when it was last used."""
        found: _Held = {}
        for path in (self._root / "content").glob("??/*"):
            with suppress(FileNotFoundError):
                status = path.lstat()
                found[path.name] = (path, status.st_size, status.st_mtime)
        return found

    def _drafts(self) -> list[tuple[Path, int, float]]:
        found = []
        for path in (self._root / "partial").glob("*"):
            with suppress(FileNotFoundError):
                status = path.lstat()
                found.append((path, status.st_size, status.st_mtime))
        return found

    def _pins(self) -> set[str]:
        """What living processes need; pins of dead ones are removed."""
        found: set[str] = set()
        for path in (self._root / "pins").glob("*.pin"):
            try:
                with path.open() as file:
                    if can_lock(file.fileno()):
                        path.unlink(missing_ok=True)
                        continue
                    found.update(str(content) for content in json.load(file))
            except FileNotFoundError:
                continue
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Only one process at a time pins or makes room."""
        with (self._root / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


_Held = dict[str, tuple[Path, int, float]]
_NOTHING: Final = (Path(), -1, 0.0)


def _is_whole(folder: Path, files: Mapping[str, tuple[str, int]]) -> bool:
    """Whether the folder has these files and no others, with their hashes."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != set(files):
        return False
    return all(
        content_hash((folder / name).read_bytes()) == content
        for name, (content, _) in files.items()
    )


def _check_name(text: str) -> None:
    if not is_hash(text):
        raise ConfigError(f"{text!r} is no hash")
