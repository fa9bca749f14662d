"""Between what travels on head streams and what both ends work with."""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from shoal.base.errors import BadInput, PeerMisbehaved, ProtocolError
from shoal.base.head import Choosing, Chosen
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.client.chain_session import ChainSession
from shoal.client.session import Move, Recovery
from shoal.plan.view import Stage
from shoal.wire.frames import Buffer
from shoal.wire.head import (
    ALLOWED_BYTES_MAX,
    SCORE_MAX,
    TOKEN_BYTES,
    TOLD_MAX,
    AskTokens,
    Bias,
    CallShape,
    GivenToken,
    Options,
    Scored,
    ToldChain,
    ToldMove,
    ToldRepair,
    ToldStage,
)

NUMERICS: Final = ("exact", "same-class", "crossed")
"""What changes of servers did to the numbers, best first."""


def read_question(ask: AskTokens, payload: Buffer) -> tuple[list[int], bytes | None]:
    """The tokens, and the mask of those that may be chosen.

    Raises:
        ProtocolError: sizes that don't fit together.
    """
    view = memoryview(payload)
    size = ask.num_ids * TOKEN_BYTES
    mask = view.nbytes - size
    if mask < 0 or mask > ALLOWED_BYTES_MAX:
        raise ProtocolError(f"{ask.num_ids} tokens announced in {view.nbytes} bytes")
    if mask and ask.count != 1:
        raise ProtocolError("a mask is for one token")
    if sum(part.size * part.times for part in ask.parts) != ask.num_ids:
        raise ProtocolError("the parts are not all tokens")
    if any(part.whole and part.times > 1 for part in ask.parts):
        raise ProtocolError("a call that was cut is named once")
    if ask.answer_start > ask.start + ask.num_ids:
        raise ProtocolError("the answer begins behind the tokens")
    return unpack_ids(view[:size]), bytes(view[size:]) if mask else None


def pack_ids(ids: Sequence[int]) -> bytes:
    """Tokens as u32, little-endian."""
    values = array("I", ids)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tobytes()


def unpack_ids(data: Buffer) -> list[int]:
    """The inverse of `pack_ids`."""
    values = array("I")
    values.frombytes(bytes(data))
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that were run in one call: its first `size` of `whole`; the rest was cut."""

    size: int
    whole: int

    @property
    def is_cut(self) -> bool:
        """Whether some were cut."""
        return self.whole > self.size


def parts_of(stretches: Sequence[Stretch]) -> list[CallShape]:
    """As they travel: runs of equal calls as one part."""
    found: list[CallShape] = []
    for one in stretches:
        if one.is_cut:
            found.append(CallShape(one.size, 1, one.whole))
        elif found and found[-1].size == one.size and not found[-1].whole:
            found[-1] = CallShape(one.size, found[-1].times + 1)
        else:
            found.append(CallShape(one.size))
    return found


def stretches_of(parts: Sequence[CallShape]) -> list[Stretch]:
    """The inverse of `parts_of`; their sum is checked by `read_question`."""
    return [
        Stretch(part.size, max(part.size, part.whole)) for part in parts for _ in range(part.times)
    ]


def to_options(choosing: Choosing) -> Options:
    """As it travels.

    Raises:
        BadInput: a seed or a bias that does not travel.
    """
    if not -(2**63) <= choosing.seed < 2**63:
        raise BadInput(f"seed {choosing.seed}: from -2**63 to 2**63 - 1")
    for token, score in choosing.bias:
        if not -SCORE_MAX <= score <= SCORE_MAX:
            raise BadInput(f"bias {score} of token {token}: from {-SCORE_MAX:g} to {SCORE_MAX:g}")
    return Options(
        temperature=choosing.temperature,
        seed=choosing.seed,
        top_k=choosing.top_k,
        top_p=choosing.top_p,
        min_p=choosing.min_p,
        repetition=choosing.repetition,
        presence=choosing.presence,
        frequency=choosing.frequency,
        bias=[Bias(token, score) for token, score in choosing.bias],
        num_best=choosing.num_best,
    )


def from_options(options: Options) -> Choosing:
    """The inverse of `to_options`."""
    return Choosing(
        temperature=options.temperature,
        seed=options.seed,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition=options.repetition,
        presence=options.presence,
        frequency=options.frequency,
        bias=tuple((one.id, one.score) for one in options.bias),
        num_best=options.num_best,
    )


def chosen_to_wire(chosen: Chosen) -> GivenToken:
    """As it travels."""
    return GivenToken(
        chosen.id, chosen.chance, [Scored(token, score) for token, score in chosen.best]
    )


def chosen_from_wire(token: GivenToken, vocab_size: int) -> Chosen:
    """The inverse of `chosen_to_wire`.

    Raises:
        PeerMisbehaved: a token that the model has not, or a NaN.
    """
    if any(
        math.isnan(score) for score in (token.chance or 0.0, *(one.score for one in token.best))
    ):
        raise PeerMisbehaved("gives log-probabilities that are no numbers")
    for one in (token.id, *(found.id for found in token.best)):
        if one >= vocab_size:
            raise PeerMisbehaved(f"gives token {one} of a vocabulary of {vocab_size}")
    best = tuple((one.id, one.score) for one in token.best)
    return Chosen(id=token.id, chance=token.chance, best=best)


def told_chain(
    session: ChainSession, repairs: Sequence[Recovery], moves: Sequence[Move]
) -> ToldChain:
    """The chain behind a session, and what is new of it."""
    return ToldChain(
        [ToldStage(one.peer, one.span.start, one.span.end) for one in session.chain],
        session.numerics,
        [
            ToldRepair(
                one.position, list(one.lost), list(one.replacement), one.replayed_tokens,
                one.pause_s,
            )
            for one in repairs[-TOLD_MAX:]
        ],
        [
            ToldMove(one.position, list(one.left), list(one.entered), one.reason, one.prepared_s)
            for one in moves[-TOLD_MAX:]
        ],
        session.adapter,
    )  # fmt: skip


def read_stages(told: ToldChain) -> tuple[Stage, ...]:
    """The chain that a head server tells of.

    Raises:
        PeerMisbehaved: spans that can't be, or an unknown class.
    """
    if told.numerics not in NUMERICS:
        raise PeerMisbehaved(f"numerics {told.numerics!r}")
    stages = []
    for one in told.stages:
        if one.start >= one.end:
            raise PeerMisbehaved(f"blocks [{one.start},{one.end})")
        stages.append(Stage(peer=PeerId(one.peer), span=Span(one.start, one.end)))
    return tuple(stages)


def read_repairs(told: ToldChain) -> list[Recovery]:
    """The repairs that are news."""
    return [
        Recovery(
            position=one.position,
            lost=tuple(map(PeerId, one.lost)),
            replacement=tuple(map(PeerId, one.replacement)),
            replayed_tokens=one.replayed_tokens,
            pause_s=one.pause_s,
        )
        for one in told.repairs
    ]


def read_moves(told: ToldChain) -> list[Move]:
    """The moves that are news."""
    return [
        Move(
            position=one.position,
            left=tuple(map(PeerId, one.left)),
            entered=tuple(map(PeerId, one.entered)),
            reason="leaving" if one.reason == "leaving" else "slow",
            prepared_s=one.prepared_s,
        )
        for one in told.moves
    ]
