"""What a server can say about itself, for a trace: who, when, how many; never what.

No payloads, token ids, prompts or addresses. A session is named by a hash of its id, a peer
by the first letters of its id, as in logs. The same session has the same name in the traces
of all its servers. Not here: what is done with events (`trace_file.py`), where they come
from (`recording.py`).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, Literal, Protocol

import msgspec

from shoal.base.ids import SessionId
from shoal.base.limits import ENTRY_TOKENS_MAX, HOPS_MAX, PAYLOAD_BYTES_MAX, SESSION_TOKENS_MAX

TRACE_VERSION: Final = 1
"""Raised when an old reader could misread a new trace."""

BLOCKS_MAX: Final = 65535

Name = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-z]{8}$")]
"""The first 8 letters of a peer id."""

SessionName = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}$")]
Word = Annotated[str, msgspec.Meta(max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Block = Annotated[int, msgspec.Meta(ge=0, le=BLOCKS_MAX)]
Position = Annotated[int, msgspec.Meta(ge=0, le=SESSION_TOKENS_MAX)]
Rows = Annotated[int, msgspec.Meta(ge=1, le=ENTRY_TOKENS_MAX)]
RowBytes = Annotated[int, msgspec.Meta(ge=0, le=PAYLOAD_BYTES_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]

RouteHop = tuple[Name, Block, Block]
"""(peer, first block, block behind the last)."""


class Began(msgspec.Struct, frozen=True, tag_field="e", tag="began", omit_defaults=True):
    """The first line of each part of a trace: who records, and how it is set up."""

    shoal_trace: Annotated[int, msgspec.Meta(ge=1)]
    """The format's version."""
    boot_s: Seconds
    """Wall clock, seconds since 1970, of the moment from which all times count."""
    peer: Name
    start: Block
    end: Block
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=BLOCKS_MAX)]
    cache_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**53)]
    row_bytes: Annotated[int, msgspec.Meta(ge=1, le=PAYLOAD_BYTES_MAX)]
    """Of one row in float32: the scale for the bounds in bytes."""
    window_bytes: Count = 0
    run_ahead_bytes: Count = 0
    log_bytes_per_session: Count = 0
    log_bytes: Count = 0
    budget_tokens: Count = 0
    part: Count = 0
    """Rises with each file of one process; the first begins at 0."""


class Routed(msgspec.Struct, frozen=True, tag_field="e", tag="routed", omit_defaults=True):
    """A route was followed, or a higher one is in force."""

    s: SessionName
    owner: Name
    epoch: Count
    hops: Annotated[list[RouteHop], msgspec.Meta(min_length=1, max_length=HOPS_MAX)]
    """The whole chain."""
    opened_ms: Count
    """When the session was opened, as its owner says."""
    held: Annotated[list[tuple[Block, Count, Position]], msgspec.Meta(max_length=HOPS_MAX)]
    """Of our hops: (first block, revision, length)."""
    parent: SessionName = ""
    parent_length: Position = 0
    in_force: Count = 0
    """The epoch that counts here, where that is another one."""
    standbys: Annotated[list[RouteHop], msgspec.Meta(max_length=HOPS_MAX)] = []
    """Servers that are fed beside the chain."""


class Arrived(msgspec.Struct, frozen=True, tag_field="e", tag="in", omit_defaults=True):
    """Rows came from the hop before."""

    s: SessionName
    at: Block
    epoch: Count
    rev: Count
    pos: Position
    n: Rows
    bytes: RowBytes
    call: Count = 0
    """Rows of the engine call that first made them, if not `n`."""
    want: Literal[0, 1, 2] = 0
    cuts: Annotated[list[tuple[Count, Position]], msgspec.Meta(max_length=64)] = []
    answer: Word = ""
    """What was answered at once: gap, stale, or ack (held already)."""


class Ran(msgspec.Struct, frozen=True, tag_field="e", tag="out", omit_defaults=True):
    """An iteration moved a session."""

    s: SessionName
    at: Block
    end: Position
    """Positions in the log."""
    cache: Position
    log_bytes: Count


class Holds(msgspec.Struct, frozen=True, tag_field="e", tag="have", omit_defaults=True):
    """What is held changed by more than running: told to the hop before."""

    s: SessionName
    at: Block
    epoch: Count
    rev: Count
    have: Position
    log_start: Position
    is_evicted: bool = False


class Linked(msgspec.Struct, frozen=True, tag_field="e", tag="link", omit_defaults=True):
    """A stream of another peer, or to it, came or went."""

    peer: Name
    what: Literal["dialled", "broken", "rows", "rows-end", "control", "control-end"]
    """dialled, broken: ours, to a successor. The others: from a predecessor or a client."""
    code: Word = ""
    links: Count = 0
    """Sessions that it carried."""


class Failed(msgspec.Struct, frozen=True, tag_field="e", tag="failed", omit_defaults=True):
    """A session can't go on here."""

    s: SessionName
    at: Block
    epoch: Count
    code: Word
    blame: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-z]{8})?$")] = ""


class Closed(msgspec.Struct, frozen=True, tag_field="e", tag="closed", omit_defaults=True):
    """A hop's state was given up."""

    s: SessionName
    at: Block


class Ended(msgspec.Struct, frozen=True, tag_field="e", tag="ended", omit_defaults=True):
    """The server stops, or its engine broke. A process that was killed doesn't say so."""

    code: Word = ""


Event = Began | Routed | Arrived | Ran | Holds | Linked | Failed | Closed | Ended


class Recorder(Protocol):
    """Who takes events."""

    def record(self, event: Event) -> None:
        """Note an event that happens now. Doesn't wait and doesn't raise."""


def session_name(session: bytes) -> str:
    """How a trace names a session."""
    return hashlib.blake2b(session, digest_size=6, person=b"shoal-trace").hexdigest()


class SessionNames:
    """Names of sessions, made once each."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def of(self, session: bytes) -> str:
        """The session's name; remembered until `forget`."""
        name = self._names.get(session)
        if name is None:
            name = self._names[session] = session_name(session)
        return name

    def forget(self, session: SessionId) -> None:
        """The session has ended here."""
        self._names.pop(session, None)
