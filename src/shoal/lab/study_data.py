"""Data for studies, read from files that the user has: round trips, requests, a map.

None is part of the package. A study that uses a file says what is in it and where it comes from:
the line of the README.md beside it that names it, and the start of its SHA-256.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from shoal.base.errors import ConfigError
from shoal.lab.sim_scenario import Request
from shoal.lab.study_maps import Map, read_map

BYTES_MAX: Final = 64_000_000
"""Files beyond this are not read: no table of round trips or requests is so large."""

HOSTS_MIN: Final = 2

AZURE_COLUMNS: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""Of the traces that Azure publishes; times as `2023-11-16 18:15:46.6805900`."""

OWN_COLUMNS: Final = ("at_s", "tokens_in", "tokens_out")
"""As `shoal simulate` takes traces."""

DIGITS_MAX: Final = 6
"""Of a second's fraction: Python knows microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rtts:
    """Round trips between hosts: seconds, `[one][other]`, symmetric where the file is."""

    rtt_s: tuple[tuple[float, ...], ...]
    provenance: str

    @property
    def num_hosts(self) -> int:
        """Rows of the table."""
        return len(self.rtt_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Requests in the order in which they came, from 0 s on."""

    requests: tuple[Request, ...]
    provenance: str

    def within(self, tokens_in: int, tokens_out: int) -> tuple[Request, ...]:
        """Those with at most so many tokens."""
        return tuple(
            one
            for one in self.requests
            if one.tokens_in <= tokens_in and one.tokens_out <= tokens_out
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A map with delays."""

    map: Map
    provenance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What the user gave."""

    rtts: Rtts | None = None
    requests: Recorded | None = None
    network: Network | None = None

    @property
    def provenances(self) -> tuple[str, ...]:
        """Of what was given."""
        given = (self.rtts, self.requests, self.network)
        return tuple(one.provenance for one in given if one is not None)


NO_DATA: Final = Data()


def load_data(rtts: Path | None, requests: Path | None, network: Path | None = None) -> Data:
    """The files that the user names. Raises as `load_rtts`, `load_requests` and `read_map`."""
    return Data(
        rtts=None if rtts is None else load_rtts(rtts),
        requests=None if requests is None else load_requests(requests),
        network=None if network is None else load_network(network),
    )


def load_network(path: Path) -> Network:
    """A map from a file. Raises as `read_map`."""
    return Network(map=read_map(path), provenance=_provenance(path, _read(path)))


def load_rtts(path: Path) -> Rtts:
    """A square table of milliseconds as CSV: bare numbers, or with the hosts' names around it.

    With names, empty cells are round trips that nobody knows: hosts are left out until none is
    missing. The diagonal may be empty.

    Raises:
        ConfigError: it can't be read, or is no such table.
    """
    content = _read(path)
    lines = [line for line in csv.reader(io.StringIO(content)) if line]
    said = ""
    if lines and not _is_number(lines[0][0]):
        named = len(lines) - 1
        lines = _without_names(lines)
        said = f" {len(lines)} of {named} hosts, whose round trips are all known."
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if len(rows) < HOSTS_MIN or any(len(row) != len(rows) for row in rows):
        found = f"{len(rows)} lines"
        if rows:
            found += f" of {min(map(len, rows))} to {max(map(len, rows))} numbers"
        raise ConfigError(
            f"{path} is no square table of milliseconds, bare or with the hosts' names on top and "
            f"at the left: it has {found}"
        )
    return Rtts(rtt_s=tuple(rows), provenance=_provenance(path, content) + said)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _row(path: Path, number: int, cells: Sequence[str]) -> tuple[float, ...]:
    try:
        row = tuple(float(cell) / 1e3 for cell in cells)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: not all are numbers ({error})") from error
    if not all(0 <= cell < math.inf for cell in row):
        raise ConfigError(f"{path}, line {number}: round trips are milliseconds from 0 on")
    return row


def _without_names(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """The numbers of hosts that have a line and a column, and know all others that are left."""
    by_name = {
        line[0]: dict(zip(lines[0][1:], line[1:], strict=False)) for line in lines[1:] if line
    }
    names = [name for name in lines[0][1:] if name in by_name]

    def gaps(name: str) -> int:
        return sum(
            not by_name[one].get(other)
            for known in names
            if known != name
            for one, other in ((name, known), (known, name))
        )

    while names:
        worst = max(names, key=gaps)
        if not gaps(worst):
            break
        names.remove(worst)
    return [[by_name[one].get(other) or "0" for other in names] for one in names]


def load_requests(path: Path) -> Recorded:
    """Times, prompts' and answers' lengths as CSV with a heading: Azure's, or our own.

    Requests without an answer, or without a prompt, are left out.

    Raises:
        ConfigError: it can't be read, or has other columns.
    """
    content = _read(path)
    reader = csv.DictReader(io.StringIO(content))
    columns = next(
        (names for names in (AZURE_COLUMNS, OWN_COLUMNS) if set(names) <= set(_heads(reader))), None
    )
    if columns is None:
        raise ConfigError(
            f"{path} has columns {', '.join(_heads(reader)) or 'without names'}; requests need "
            f"{', '.join(AZURE_COLUMNS)}, or {', '.join(OWN_COLUMNS)}"
        )
    found = []
    for line, row in enumerate(reader, 2):
        try:
            found.append(_request(row, columns))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}, line {line}: {error}") from error
    whole = sorted((one for one in found if min(one[1:]) >= 1), key=lambda one: one[0])
    if not whole:
        raise ConfigError(f"{path} has no request with a prompt and an answer")
    start_s = whole[0][0]
    return Recorded(
        requests=tuple(
            Request(at_s=at_s - start_s, tokens_in=tokens_in, tokens_out=tokens_out)
            for at_s, tokens_in, tokens_out in whole
        ),
        provenance=_provenance(path, content),
    )


def _heads(reader: csv.DictReader[str]) -> Sequence[str]:
    return reader.fieldnames or ()


def _request(row: Mapping[str, str], columns: Sequence[str]) -> tuple[float, int, int]:
    when, tokens_in, tokens_out = (row[name] for name in columns)
    if columns == OWN_COLUMNS:
        at_s = float(when)
    else:
        whole, _, fraction = when.partition(".")
        at_s = datetime.fromisoformat(f"{whole}.{fraction[:DIGITS_MAX]:0<6}+00:00").timestamp()
    if not math.isfinite(at_s):
        raise ValueError(f"{when!r} is no time")
    return at_s, int(tokens_in), int(tokens_out)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > BYTES_MAX:
            raise ConfigError(f"{path} is larger than {BYTES_MAX} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from error


def _provenance(path: Path, content: str) -> str:
    """What the README.md beside it says of it, and its hash."""
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    try:
        lines = (path.parent / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    said = next((line.lstrip("*- ").strip() for line in lines if path.name in line), None)
    if said is None:
        said = f"`{path.name}`: no README.md beside it says where it comes from."
    return f"{said} SHA-256 {digest}..."


def stretch(
    recorded: Sequence[Request], count: int, rate_per_s: float, rng: random.Random
) -> tuple[Request, ...]:
    """`count` requests that came one after the other, from a place at random, as long as they
    were; their times made slower or quicker so that `rate_per_s` come on average.

    Raises:
        ConfigError: fewer were recorded.
    """
    if len(recorded) < max(2, count):
        raise ConfigError(f"{count} requests are wanted, and {len(recorded)} were recorded")
    start = rng.randrange(len(recorded) - count + 1)
    taken = recorded[start : start + count]
    span_s = taken[-1].at_s - taken[0].at_s
    factor = (count - 1) / rate_per_s / span_s if span_s else 0.0
    return tuple(
        Request(
            at_s=(one.at_s - taken[0].at_s) * factor,
            tokens_in=one.tokens_in,
            tokens_out=one.tokens_out,
        )
        for one in taken
    )
