"""Messages of head streams: a thin client sends tokens and gets tokens.

The dialler asks; the dialled server has the model's embedding and head, and is itself a
client of the chain. A session here is named by a number that the dialler chose; all of them
end with the stream. The dialler keeps its tokens, so that it can ask another server.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from shoal.base.head import BEST_MAX
from shoal.base.limits import HOPS_MAX, SESSION_TOKENS_MAX
from shoal.wire.fields import (
    Block,
    Count,
    Name,
    OptionalContent,
    Peer,
    Position,
    Seconds,
    WireMessage,
)

TOKEN_BYTES = 4
"""Bytes of a token in a payload: u32, little-endian."""

PARTS_MAX = 4096
"""Parts of one question, runs of equal ones counted once: turns of a long conversation."""

BIAS_MAX = 1024
"""Tokens with a bias: OpenAI's API allows 300."""

END_IDS_MAX = 64
"""Tokens that end an answer; models have up to a handful."""

ALLOWED_BYTES_MAX = 1 << 17
"""A bit for each of a million tokens."""

TOLD_MAX = 64
"""Repairs and moves in one message; more come with the next one."""

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
SCORE_MAX = 1e9
"""What options may add to a score, or take from it: scores stay finite."""

Score = Annotated[float, msgspec.Meta(ge=-SCORE_MAX, le=SCORE_MAX)]
Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Bias(WireMessage, frozen=True):
    """A token and what is added to its score."""

    id: TokenId
    score: Score


class Scored(WireMessage, frozen=True):
    """A token and its log-probability, which may be -inf."""

    id: TokenId
    score: float


class CallShape(WireMessage, frozen=True):
    """`times` calls of `size` tokens each, one after the other.

    With `whole` (once) it was a call of so many tokens, of which the first `size` are left.
    """

    size: Annotated[int, msgspec.Meta(ge=1, le=SESSION_TOKENS_MAX)]
    times: Annotated[int, msgspec.Meta(ge=1, le=SESSION_TOKENS_MAX)] = 1
    whole: Position = 0


class Options(WireMessage, frozen=True):
    """How tokens are chosen; see `shoal.base.head.Choosing`."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] = 0
    top_k: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)] | None = None
    top_p: Ratio | None = None
    min_p: Ratio | None = None
    repetition: Annotated[float, msgspec.Meta(ge=1e-3, le=1e3)] = 1.0
    presence: Score = 0.0
    frequency: Score = 0.0
    bias: Annotated[list[Bias], msgspec.Meta(max_length=BIAS_MAX)] = msgspec.field(
        default_factory=list
    )
    num_best: Annotated[int, msgspec.Meta(ge=0, le=BEST_MAX)] | None = None


class AskTokens(WireMessage, tag=70, frozen=True):
    """Keep `start` positions of a session, append tokens, answer with up to `count` new ones.

    The payload is the `num_ids` tokens (u32), then a bit for each token that may be chosen, or
    nothing if all may; a mask goes with `count` 1. `parts` says in which calls the tokens are
    run: a replay repeats those of the first time, so that exact servers compute the same
    bits. A new session begins empty, or as a copy of `parent`'s first `start` positions. Of all
    positions those from `answer_start` on are the answer, for penalties. `count` 0 only runs
    the tokens. The last token of an answer is not appended.
    """

    call: Count
    session: Count
    start: Position
    num_ids: Position
    parts: Annotated[list[CallShape], msgspec.Meta(max_length=PARTS_MAX)]
    count: Position
    answer_start: Position
    options: Options
    end_ids: Annotated[list[TokenId], msgspec.Meta(max_length=END_IDS_MAX)]
    encoding: Name = ""
    """Of the rows along the chain, when the session begins; empty: the head's own."""
    is_compressed: bool = False
    parent: Count | None = None
    adapter: OptionalContent = b""
    """Name of the LoRA adapter of the session, which the chain's servers must have."""


class GivenToken(WireMessage, frozen=True):
    """A token of an answer; with log-probabilities, if they were asked for."""

    id: TokenId
    chance: float | None = None
    best: Annotated[list[Scored], msgspec.Meta(max_length=BEST_MAX)] = msgspec.field(
        default_factory=list
    )


class ToldStage(WireMessage, frozen=True):
    """`peer` runs blocks [start, end)."""

    peer: Peer
    start: Block
    end: Block


class ToldRepair(WireMessage, frozen=True):
    """One repair of the chain."""

    position: Position
    lost: Annotated[list[Peer], msgspec.Meta(max_length=HOPS_MAX)]
    replacement: Annotated[list[Peer], msgspec.Meta(max_length=HOPS_MAX)]
    replayed_tokens: Count
    pause_s: Seconds


class ToldMove(WireMessage, frozen=True):
    """One planned change of the chain."""

    position: Position
    left: Annotated[list[Peer], msgspec.Meta(max_length=HOPS_MAX)]
    entered: Annotated[list[Peer], msgspec.Meta(max_length=HOPS_MAX)]
    reason: Annotated[str, msgspec.Meta(max_length=16)]
    prepared_s: Seconds


class ToldChain(WireMessage, frozen=True):
    """The chain behind a session, and what happened to it since the last time."""

    stages: Annotated[list[ToldStage], msgspec.Meta(max_length=HOPS_MAX)]
    numerics: Annotated[str, msgspec.Meta(max_length=16)]
    repairs: Annotated[list[ToldRepair], msgspec.Meta(max_length=TOLD_MAX)]
    moves: Annotated[list[ToldMove], msgspec.Meta(max_length=TOLD_MAX)]
    adapter: OptionalContent = b""
    """That of the session. Who asked for one and is not told it, gets it left out."""


class Given(WireMessage, tag=71, frozen=True):
    """The next tokens of an answer. `chain` comes with the first, and when it changed."""

    call: Count
    tokens: Annotated[list[GivenToken], msgspec.Meta(max_length=1024)]
    is_last: bool = False
    chain: ToldChain | None = None


class StopTokens(WireMessage, tag=72, frozen=True):
    """The rest of an answer is not wanted; its session stays."""

    call: Count


class EndTokens(WireMessage, tag=73, frozen=True):
    """A session is not needed any more."""

    session: Count
