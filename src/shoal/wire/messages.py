"""Every message of the protocol, typed.

Messages are msgspec structs, packed as arrays with an integer tag in front. New
fields are appended with a default; readers ignore fields they don't know. Bytes of
a stranger become values only through `decode`, which validates types and ranges.

A **link** carries a session's rows over one border between two hops; it is named by
(session, border), where `border` is the first block behind it. See docs/protocol.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from shoal.base.errors import ProtocolError
from shoal.base.ids import PEER_ID_BYTES
from shoal.base.limits import (
    CUTS_MAX,
    ENTRIES_PER_FRAME_MAX,
    ENTRY_TOKENS_MAX,
    HOPS_MAX,
    PAYLOAD_BYTES_MAX,
    SESSIONS_KEPT_MAX,
)
from shoal.wire.adapters import AdapterPiece, OfferAdapter, TookAdapter, WantAdapter
from shoal.wire.directory import GetLoad, GetRecords, Load, Publish, Records
from shoal.wire.fields import (
    Block,
    Count,
    Detail,
    Name,
    Nonce,
    OptionalContent,
    Peer,
    Position,
    RecordBytes,
    Seconds,
    Session,
    Signature,
    WireMessage,
)
from shoal.wire.frames import Buffer
from shoal.wire.gossip import (
    Beat,
    Digest,
    Offer,
    Part,
    Suspects,
    Taken,
    WantRecords,
)
from shoal.wire.head import AskTokens, EndTokens, Given, StopTokens
from shoal.wire.ring import (
    GetRing,
    JoinRing,
    Measured,
    RingModel,
    RingOver,
    RingReport,
    RingState,
    RingTask,
)
from shoal.wire.training import Backward, Chunk, Done, Forget, Forward, PutTensors, Training
from shoal.wire.weights import GetHoldings, GetPiece, Holdings, Piece

Want = Literal[0, 1, 2]

WANT_NONE: Want = 0
WANT_LAST: Want = 1
WANT_ALL: Want = 2


# --- first frame in either direction ------------------------------------------


class Hello(WireMessage, tag=1, frozen=True):
    """Who speaks which version for which swarm, and what the stream is for."""

    version: Count
    swarm: Name
    purpose: Name
    membership: Annotated[bytes, msgspec.Meta(max_length=4096)] = b""
    agent: Name = ""


# --- control stream -----------------------------------------------------------


class Hop(WireMessage, frozen=True):
    """One stage of a chain: `peer` runs blocks [start, end) and sends in `encoding`.

    `start == end` is a pass-through: the client relaying over a border between two
    servers that can't reach each other. `is_fresh`: forget what you hold of the session
    from earlier epochs, it is not to be trusted.
    """

    peer: Peer
    start: Block
    end: Block
    encoding: Name
    is_fresh: bool = False


class Fork(WireMessage, frozen=True):
    """The session starts as a copy of `session`'s first `length` positions at `rev`."""

    session: Session
    rev: Count
    length: Position


class Standby(WireMessage, frozen=True):
    """A hop beside the chain: `peer` is fed what a hop from block `start` is, and runs it.

    Whoever ends at `start` feeds it: the first hop of the chain that does, the owner if the
    chain begins there, or else another standby. It is sent rows when `lag_rows` of them wait
    (0: at once), and sends none itself unless a standby begins at `end`. A later route may
    make it a hop.
    """

    peer: Peer
    start: Block
    end: Block
    encoding: Name
    lag_rows: Count = 0


class RouteBody(WireMessage, frozen=True):
    """What the owner of a session signs. `opened_ms` fixes the victim order for life.

    `adapter` names the LoRA adapter that all rows go through; empty: none.
    """

    owner: Peer
    nonce: Nonce
    epoch: Count
    model: Name
    opened_ms: Count
    hops: Annotated[list[Hop], msgspec.Meta(min_length=1, max_length=HOPS_MAX)]
    parent: Fork | None = None
    standbys: Annotated[list[Standby], msgspec.Meta(max_length=HOPS_MAX)] = msgspec.field(
        default_factory=list
    )
    adapter: OptionalContent = b""


class Route(WireMessage, tag=2, frozen=True):
    """Make or change a chain. Idempotent; the highest epoch wins."""

    call: Count
    body: Annotated[bytes, msgspec.Meta(max_length=64 << 10)]
    signature: Signature
    records: Annotated[list[RecordBytes], msgspec.Meta(max_length=HOPS_MAX)] = msgspec.field(
        default_factory=list
    )


class Held(WireMessage, frozen=True):
    """What a hop holds of a session: `length` positions of `rev` from block `start` on.

    `ready` of them went through its blocks; the others wait.
    """

    start: Block
    rev: Count
    length: Position
    ready: Position = 0


class Routed(WireMessage, tag=3, frozen=True):
    """The peer follows the route of `epoch`; `held` has one item per hop that it runs."""

    call: Count
    session: Session
    epoch: Count
    held: Annotated[list[Held], msgspec.Meta(max_length=HOPS_MAX)]


class Close(WireMessage, tag=4, frozen=True):
    """The owner is done with the session; its cache and log are freed."""

    session: Session


class Keep(WireMessage, tag=16, frozen=True):
    """All sessions of the owner that this server is to keep; any other is closed.

    Sent when the control stream opens and every KEEP_PERIOD_S: a Close may be lost with
    the stream that carried it.
    """

    sessions: Annotated[list[Session], msgspec.Meta(max_length=SESSIONS_KEPT_MAX)]


class GetHeld(WireMessage, tag=17, frozen=True):
    """Asks how far a session of ours has come; answered by Routed."""

    call: Count
    session: Session


class Leaving(WireMessage, tag=18, frozen=True):
    """Server to owner: I shall stop serving blocks [start, end); move your sessions in time."""

    start: Block
    end: Block
    within_s: Seconds


class Room(WireMessage, tag=19, frozen=True):
    """Server to owner: there is room for the session that waits in line here; come now."""

    session: Session


class Alive(WireMessage, tag=5, frozen=True):
    """Answers a Ping. `iteration` counts finished engine iterations.

    `iteration_s` is how long the running iteration has lasted (0 when none runs) and
    `iteration_estimate_s` how long the server expected it to last. `decode_s_per_block` is what
    recent iterations with nothing but decode rows took for each block (0: there were none).
    """

    call: Count
    iteration: Count
    queue_eta_s: Seconds
    iteration_s: Seconds
    iteration_estimate_s: Seconds
    decode_s_per_block: Seconds = 0.0


class Broken(WireMessage, tag=6, frozen=True):
    """A hop can't send over its downstream link."""

    session: Session
    border: Block
    epoch: Count
    peer: Peer
    code: Name
    detail: Detail = ""


class Failed(WireMessage, tag=7, frozen=True):
    """A hop can't go on with a session. `blame` names the peer at fault, if one is."""

    session: Session
    start: Block
    epoch: Count
    code: Name
    detail: Detail = ""
    retry_after_s: Seconds | None = None
    blame: Annotated[bytes, msgspec.Meta(max_length=PEER_ID_BYTES)] = b""


class Error(WireMessage, tag=8, frozen=True):
    """The answer to a call that failed, or (call 0) the reason for closing the stream."""

    call: Count
    code: Name
    detail: Detail = ""
    retry_after_s: Seconds | None = None


class Ping(WireMessage, tag=9, frozen=True):
    """Asks for an Alive. A client asks every ALIVE_PERIOD_S while it waits for rows."""

    call: Count


# --- data links ----------------------------------------------------------------


class Open(WireMessage, tag=20, frozen=True):
    """Sender to receiver: what do you have? Answered by Have or Stale."""

    session: Session
    border: Block
    epoch: Count


class Have(WireMessage, tag=21, frozen=True):
    """Receiver to sender: start your cursor at `length`.

    `worked_off` of it is acknowledged; `window_bytes` may be unacknowledged.
    """

    session: Session
    border: Block
    epoch: Count
    rev: Count
    length: Position
    window_bytes: Count
    worked_off: Position = 0


class Gap(WireMessage, tag=22, frozen=True):
    """Receiver to sender: rows are missing behind `length`; go back there."""

    session: Session
    border: Block
    epoch: Count
    rev: Count
    length: Position


class Ack(WireMessage, tag=23, frozen=True):
    """Receiver to sender: rows up to `length` of `rev` are worked off."""

    session: Session
    border: Block
    epoch: Count
    rev: Count
    length: Position


class Stale(WireMessage, tag=24, frozen=True):
    """Receiver to sender: you are not the predecessor, or not of my `epoch`."""

    session: Session
    border: Block
    epoch: Count


class Cut(WireMessage, frozen=True):
    """Revision `rev` began by forgetting positions >= `position`."""

    rev: Count
    position: Position


class Entry(WireMessage, frozen=True):
    """One chunk of consecutive rows of one session.

    `rev` is the sender's revision. A receiver at a lower revision, but at least
    `base_rev`, first cuts to the lowest position among the `cuts` of later revisions
    than its own; below `base_rev` it answers Gap. `call_count` is the number of rows
    of the engine call that first computed them (>= `count`; more when the entry was
    cut since), so that a replay can repeat the call's shape.
    """

    session: Session
    border: Block
    epoch: Count
    rev: Count
    base_rev: Count
    cuts: Annotated[list[Cut], msgspec.Meta(max_length=CUTS_MAX)]
    position: Position
    count: Annotated[int, msgspec.Meta(ge=1, le=ENTRY_TOKENS_MAX)]
    call_count: Annotated[int, msgspec.Meta(ge=1, le=ENTRY_TOKENS_MAX)]
    want: Want
    encoding: Name
    payload_bytes: Annotated[int, msgspec.Meta(ge=0, le=PAYLOAD_BYTES_MAX)]


class Rows(WireMessage, tag=25, frozen=True):
    """Rows of many sessions; the frame's payload holds theirs one after the other."""

    entries: Annotated[list[Entry], msgspec.Meta(min_length=1, max_length=ENTRIES_PER_FRAME_MAX)]


ControlMessage = (
    Route
    | Routed
    | Close
    | Keep
    | Alive
    | Broken
    | Failed
    | Error
    | Ping
    | GetRecords
    | Records
    | Publish
    | GetLoad
    | Load
    | GetHeld
    | Leaving
    | Room
)
LinkMessage = Open | Have | Gap | Ack | Stale | Rows | Error
GossipMessage = Beat | Digest | Offer | WantRecords | Suspects | Taken | Part | Records | Error
AdapterMessage = OfferAdapter | WantAdapter | AdapterPiece | TookAdapter | Error
WeightsMessage = GetHoldings | Holdings | GetPiece | Piece | Error
TrainingMessage = PutTensors | Forward | Backward | Forget | Chunk | Done | Training | Error
RingMessage = (
    JoinRing | RingModel | Measured | RingTask | RingReport | RingOver | GetRing | RingState | Error
)
HeadMessage = AskTokens | Given | StopTokens | EndTokens | Error
Message = (
    Hello
    | ControlMessage
    | LinkMessage
    | GossipMessage
    | WeightsMessage
    | AdapterMessage
    | TrainingMessage
    | RingMessage
    | HeadMessage
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_body_decoder = msgspec.msgpack.Decoder(RouteBody)


def encode(message: Message | RouteBody) -> bytes:
    """The message as msgpack bytes."""
    return _encoder.encode(message)


def decode(header: Buffer) -> Message:
    """The message in a frame's header.

    Raises:
        ProtocolError: not one valid message.
    """
    try:
        return _decoder.decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed message: {error}") from error


def decode_route_body(body: Buffer) -> RouteBody:
    """The signed part of a Route.

    Raises:
        ProtocolError: not one valid route body.
    """
    try:
        return _body_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed route: {error}") from error


def split_rows(rows: Rows, payload: Buffer) -> list[tuple[Entry, memoryview]]:
    """Each entry with its share of the payload, uncopied.

    Raises:
        ProtocolError: the entries' sizes don't add up to the payload.
    """
    view = memoryview(payload)
    total = sum(entry.payload_bytes for entry in rows.entries)
    if total != view.nbytes:
        raise ProtocolError(f"entries announce {total} bytes, the frame carries {view.nbytes}")
    parts: list[tuple[Entry, memoryview]] = []
    offset = 0
    for entry in rows.entries:
        parts.append((entry, view[offset : offset + entry.payload_bytes]))
        offset += entry.payload_bytes
    return parts
