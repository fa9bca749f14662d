"""Reading traces that servers wrote: text of strangers, checked line by line.

A file holds one or more parts, each of one process and beginning with `Began`; see
`shoal.server.events`. Not here: what they mean together (`trace_incident.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec

from shoal.base.errors import ConfigError
from shoal.server.events import TRACE_VERSION, Began, Event, Seconds

FILE_BYTES_MAX: Final = 256 << 20
"""Four times what a server writes unless told otherwise."""

LINE_BYTES_MAX: Final = 64 << 10
"""A route with the most hops takes a tenth."""

Timed = tuple[float, Event]
"""(seconds, event)."""

_DECODER: Final = msgspec.json.Decoder(tuple[Seconds, Event])


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What one process recorded, in order; times are wall-clock seconds since 1970."""

    began: Began
    events: tuple[Timed, ...]

    @property
    def peer(self) -> str:
        """Who recorded it."""
        return self.began.peer

    @property
    def end_s(self) -> float:
        """The last sign of life."""
        return self.events[-1][0] if self.events else self.began.boot_s

    def shifted(self, by_s: float) -> Trace:
        """The same with another clock."""
        began = msgspec.structs.replace(self.began, boot_s=self.began.boot_s + by_s)
        events = tuple((time_s + by_s, event) for time_s, event in self.events)
        return Trace(began=began, events=events)


def read_traces(paths: Iterable[Path]) -> list[Trace]:
    """The processes that recorded these files, by peer and time.

    Raises:
        ConfigError: a file can't be read or is no trace; names the file and the line.
    """
    parts: list[Trace] = []
    for path in paths:
        parts += parse_trace(_read(path), str(path))
    parts.sort(key=lambda part: (part.peer, part.began.boot_s, part.began.part))
    joined: list[Trace] = []
    for part in parts:
        if joined and _is_same_process(joined[-1], part):
            before = joined[-1]
            if before.began.part == part.began.part:
                continue  # the same file twice
            joined[-1] = Trace(began=part.began, events=before.events + part.events)
        else:
            joined.append(part)
    return [_with_first_part(trace) for trace in joined]


def parse_trace(data: bytes, name: str) -> list[Trace]:
    """The parts of one file called `name`.

    A last line that was cut off, as by a full disk, is left out.

    Raises:
        ConfigError: names the line.
    """
    parts: list[Trace] = []
    began: Began | None = None
    events: list[Timed] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        if began is not None and _is_cut_off(lines, number):
            continue
        time_s, event = _parse_line(line, f"{name} line {number}")
        if isinstance(event, Began):
            _check_began(event, f"{name} line {number}")
            if began is not None:
                parts.append(Trace(began=began, events=tuple(events)))
            began, events = event, []
        elif began is None:
            raise ConfigError(f"{name} line {number}: a trace begins with its server's description")
        elif events and began.boot_s + time_s < events[-1][0]:
            raise ConfigError(f"{name} line {number}: time goes back")
        else:
            events.append((began.boot_s + time_s, event))
    if began is None:
        raise ConfigError(f"{name}: no trace (an empty file)")
    return [*parts, Trace(began=began, events=tuple(events))]


def _is_cut_off(lines: list[bytes], number: int) -> bool:
    """Whether this is a part's last line and not even JSON."""
    is_last = number == len(lines) or b'"shoal_trace":' in lines[number]
    if not is_last:
        return False
    try:
        msgspec.json.decode(lines[number - 1])
    except msgspec.DecodeError:
        return True
    return False


def _parse_line(line: bytes, where: str) -> Timed:
    if len(line) > LINE_BYTES_MAX:
        raise ConfigError(f"{where}: longer than any event ({len(line)} bytes)")
    try:
        return _DECODER.decode(line)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_began(began: Began, where: str) -> None:
    if began.shoal_trace != TRACE_VERSION:
        raise ConfigError(
            f"{where}: a trace of version {began.shoal_trace}; this program reads {TRACE_VERSION}"
        )
    if not began.start < began.end <= began.num_blocks:
        raise ConfigError(f"{where}: blocks [{began.start},{began.end}) of {began.num_blocks}")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"can't read the trace {path}: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{path} has more than {FILE_BYTES_MAX} bytes: cut out the incident")
    return data


def _is_same_process(before: Trace, part: Trace) -> bool:
    return (before.peer, before.began.boot_s) == (part.peer, part.began.boot_s)


def _with_first_part(trace: Trace) -> Trace:
    return replace(trace, began=msgspec.structs.replace(trace.began, part=0))
