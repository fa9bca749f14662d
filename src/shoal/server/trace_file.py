"""Writing a trace: one JSON line per event, at once, into files of a bounded size.

Each line goes to the operating system by itself, so that a killed process loses none that it
began to write, and costs some microseconds. When the file has half of its bound it becomes
`FILE.1`, in place of an older one, and a new part begins. A server that starts again goes on
in the same file: what its killed predecessor wrote is the interesting part.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import structs

from shoal.base.errors import ConfigError
from shoal.server.events import Began, Closed, Event, Routed

logger = logging.getLogger(__name__)

TRACE_BYTES_MAX: Final = 64 << 20
"""Both files together: some 400,000 events, an hour of one busy session at 50 tokens/s."""

TRACE_BYTES_MIN: Final = 64 << 10
"""Less would hardly hold what is open now."""

_MARK: Final = b'"shoal_trace":'
_HEAD_BYTES: Final = 200


class TraceWriter:
    """A recorder (`events.Recorder`) that writes lines `[seconds, event]`.

    Args:
        path: goes on if it is a trace, is made if it is missing.
        began: the first line of each part, `part` aside.
        clock: any clock that never goes back; 0 is the moment of `began.boot_s`.

    Raises:
        ConfigError: the file can't be written, or is something else.
    """

    def __init__(
        self,
        path: Path,
        began: Began,
        clock: Callable[[], float],
        *,
        limit_bytes: int = TRACE_BYTES_MAX,
    ) -> None:
        if limit_bytes < TRACE_BYTES_MIN:
            raise ConfigError(f"a trace needs at least {TRACE_BYTES_MIN} bytes, not {limit_bytes}")
        self._path = path
        self._began = began
        self._clock = clock
        self._zero_s = clock()
        self._part_bytes_max = limit_bytes // 2
        self._encoder = msgspec.json.Encoder()
        self._routes: dict[str, Routed] = {}
        """The last route of each session that is open: a new part begins with them."""
        self._part = 0
        self._size = 0
        self._handle = -1
        try:
            self._open()
        except OSError as error:
            raise ConfigError(f"can't write the trace {path}: {error.strerror}") from error

    def record(self, event: Event) -> None:
        """Write one event. A full disk ends the trace, not the server."""
        if isinstance(event, Routed):
            self._routes[event.s] = event
        elif isinstance(event, Closed):
            self._routes.pop(event.s, None)
        if self._handle < 0:
            return
        try:
            if self._size > self._part_bytes_max:
                self._rotate()
            self._write(event)
        except OSError as error:
            logger.warning("trace ended file=%s reason=%s", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        """Write no more."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._handle = os.open(self._path, flags, 0o600)
        self._size = os.fstat(self._handle).st_size
        if self._size and _MARK not in os.pread(self._handle, _HEAD_BYTES, 0):
            self.close()
            raise ConfigError(f"{self._path} exists and is no trace: name another file")
        if self._size and os.pread(self._handle, 1, self._size - 1) != b"\n":
            self._size += os.write(self._handle, b"\n")  # a line that was cut off
        self._write(structs.replace(self._began, part=self._part))

    def _rotate(self) -> None:
        self.close()
        self._path.replace(self._path.with_name(self._path.name + ".1"))
        self._part += 1
        self._open()
        for route in self._routes.values():
            self._write(route)

    def _write(self, event: Event) -> None:
        line = self._encoder.encode((round(self._clock() - self._zero_s, 6), event)) + b"\n"
        self._size += os.write(self._handle, line)
