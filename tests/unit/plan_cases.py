"""Small swarms for the tests of plan: strategies, and answers found by trying everything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise

from hypothesis import strategies as st

from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.view import Experience, ServerState, ServerView, Stage, SwarmView


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(32, "big"))


def server(
    number: int,
    start: int,
    end: int,
    *,
    state: ServerState = "online",
    numerics: str = "a",
    decode_s: float = 0.01,
) -> ServerView:
    return ServerView(
        peer=peer(number),
        addresses=(),
        span=Span(start, end),
        state=state,
        numerics=numerics,
        encodings=("float32",),
        decode_s_per_block=decode_s,
    )


def swarm(num_blocks: int, *servers: ServerView) -> SwarmView:
    return SwarmView(model="m", num_blocks=num_blocks, hidden_size=8, servers=servers)


def stages(*hops: tuple[int, int, int]) -> tuple[Stage, ...]:
    return tuple(Stage(peer=peer(number), span=Span(start, end)) for number, start, end in hops)


def hops(chain: Iterable[Stage]) -> list[tuple[int, int, int]]:
    return [
        (int.from_bytes(stage.peer, "big"), stage.span.start, stage.span.end) for stage in chain
    ]


@st.composite
def spans(draw: st.DrawFn, num_blocks: int) -> Span:
    start = draw(st.integers(0, num_blocks - 1))
    return Span(start, draw(st.integers(start + 1, num_blocks)))


@st.composite
def swarms(draw: st.DrawFn, num_blocks: int = 6, servers_max: int = 6) -> SwarmView:
    found = []
    for number in range(1, draw(st.integers(0, servers_max)) + 1):
        span = draw(spans(num_blocks))
        found.append(
            server(
                number,
                span.start,
                span.end,
                state=draw(st.sampled_from(["online", "online", "online", "draining", "joining"])),
                numerics=draw(st.sampled_from(["a", "a", "b"])),
                decode_s=draw(st.sampled_from([0.0, 0.001, 0.02, 0.5])),
            )
        )
    return swarm(num_blocks, *found)


@st.composite
def experiences(draw: st.DrawFn, view: SwarmView) -> Experience:
    peers = [one.peer for one in view.servers]
    if not peers:
        return Experience()
    some = st.sampled_from(peers)
    return Experience(
        rtt_s=draw(st.dictionaries(some, st.sampled_from([0.0, 0.01, 0.3]))),
        avoid=draw(st.frozensets(some, max_size=3)),
        unreachable_pairs=draw(st.frozensets(st.tuples(some, some), max_size=4)),
    )


def check_chain(chain: Sequence[Stage], span: Span, kept: Collection[Stage] = ()) -> None:
    """The chain covers `span` exactly, without empty stages or one peer twice in a row.

    Unless one of the two was `kept`.
    """
    assert chain[0].span.start == span.start
    assert chain[-1].span.end == span.end
    assert all(len(stage.span) for stage in chain)
    for before, after in pairwise(chain):
        assert before.span.end == after.span.start
        assert before.peer != after.peer or {before, after} & set(kept)


def every_chain(view: SwarmView, span: Span, before: PeerId | None = None) -> Iterator[list[Stage]]:
    """Every chain of usable servers over `span` with cuts anywhere; small swarms only."""
    if not len(span):
        yield []
        return
    for one in view.servers:
        if one.state == "joining" or one.peer == before or span.start not in one.span:
            continue
        for end in range(span.start + 1, min(one.span.end, span.end) + 1):
            stage = Stage(peer=one.peer, span=Span(span.start, end))
            for rest in every_chain(view, Span(end, span.end), one.peer):
                yield [stage, *rest]
