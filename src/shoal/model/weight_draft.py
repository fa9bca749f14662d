"""Tensors and files of the store that are being written: they survive a stop and go on.

A draft is locked while somebody writes it; the lock ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from shoal.base.content import content_digest
from shoal.base.errors import ConfigError

NO_LINKS: Final = os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags to open files of the store with."""

_READ_BYTES: Final = 16 << 20


class Draft:
    """A tensor or file that is being written, in order. Close it in any case.

    What was appended stays when it is closed unfinished, and the next draft goes on there.
    """

    def __init__(self, handle: int, path: Path, target: Path, num_bytes: int) -> None:
        self._file = os.fdopen(handle, "r+b", buffering=0)
        self._path, self._target, self._num_bytes = path, target, num_bytes
        self._digest = content_digest()
        self._is_finished = False
        self.held = 0
        """Bytes from the start that are here."""
        self._resume()

    def _resume(self) -> None:
        if os.fstat(self._file.fileno()).st_size > self._num_bytes:
            self.restart()
        while piece := self._file.read(_READ_BYTES):
            self._digest.update(piece)
            self.held += len(piece)

    def append(self, piece: bytes | memoryview) -> None:
        """Add the next bytes.

        Raises:
            ConfigError: the disk is full or broken.
        """
        view = memoryview(piece)
        try:
            while view.nbytes:
                written = self._file.write(view)
                self._digest.update(view[:written])
                self.held += written
                view = view[written:]
        except OSError as error:
            raise not_writable(self._path.parent, error) from error

    def restart(self) -> None:
        """Forget what is held: it is not what it should be."""
        self._file.seek(0)
        self._file.truncate(0)
        self._digest = content_digest()
        self.held = 0

    def finish(self) -> bool:
        """Move it to its place if it is whole and has its hash; else False, nothing moves."""
        if self.held != self._num_bytes or self._digest.hexdigest() != self._target.name:
            return False
        try:
            os.fsync(self._file.fileno())
            os.replace(self._path, self._target)
        except OSError as error:
            raise not_writable(self._path.parent, error) from error
        self._is_finished = True
        return True

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if not self._file.closed:
            is_private = self._path.name != self._target.name
            if not self._is_finished and (is_private or not self.held):
                # Nobody could go on with it, or would gain by it.
                self._path.unlink(missing_ok=True)
            self._file.close()


def open_draft(folder: Path, content: str) -> tuple[int, Path]:
    """The draft of `content`, locked; a private one if another process has it."""
    path = folder / content
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o600)
        if not can_lock(handle):
            os.close(handle)
            handle, private = tempfile.mkstemp(prefix=f"{content}-", dir=folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
            return handle, Path(private)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(path)):
                return handle, path
        os.close(handle)  # finished or removed between opening and locking


def can_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_abandoned(path: Path) -> bool:
    """Remove a draft that nobody writes; False: somebody does."""
    try:
        handle = os.open(path, os.O_RDWR | NO_LINKS)
    except OSError:
        return False
    try:
        if not can_lock(handle):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(handle)


def not_writable(root: Path, error: OSError) -> ConfigError:
    """What to say when the disk refuses."""
    return ConfigError(
        f"can't write to {root}: {error}: make room there, or set SHOAL_CACHE to another folder"
    )
