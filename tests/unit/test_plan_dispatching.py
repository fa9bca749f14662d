"""Chains for a dispatcher, from records: prices, seats, and what is left out."""

from dataclasses import replace

import pytest

from shoal.base.errors import NoRouteError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.plan.dispatching import BATCH_MAX, batch_max, compose_live
from shoal.plan.live_problem import SESSION_TOKENS
from shoal.plan.routing import ANY_SERVER, Wanted, will_do
from shoal.plan.spec import DecodeTimes
from shoal.plan.view import Experience, ServerView, Stage, SwarmView

BLOCKS = 8


def server(name, start, end, decode_s=0.01, *, sessions=2, curve=(), **fields):
    return ServerView(
        peer=PeerId(name.encode() * 32),
        addresses=(),
        span=Span(start, end),
        cache_tokens=sessions * SESSION_TOKENS,
        decode_s_per_block=decode_s,
        decode_s_by_batch=curve,
        **fields,
    )


def view(*servers):
    return SwarmView(model="m", num_blocks=BLOCKS, hidden_size=8, servers=servers)


def names(chain):
    return "".join(chr(stage.peer[0]) for stage in chain)


def filled(composition, count):
    """The chains that so many requests get, one after the other."""
    running = []
    for _ in range(count):
        chain = composition.choose(running)
        if chain is None:
            break
        running.append(chain)
    return [names(chain) for chain in running]


NEAR = Experience(rtt_s={PeerId(one.encode() * 32): 0.02 for one in "abcdef"})


def test_the_fastest_chain_fills_first_and_then_one_waits():
    found = compose_live(view(server("a", 0, 4), server("b", 4, 8), server("c", 0, 8, 0.03)), NEAR)
    assert filled(found, 9) == ["ab", "ab", "c", "c"]
    assert found.seats == 4


def test_with_longer_passes_chains_fill_side_by_side():
    curve = ((1, 0.01), (2, 0.015), (4, 0.025))
    slow = ((1, 0.013), (2, 0.0195), (4, 0.0325))
    found = compose_live(
        view(server("a", 0, 8, curve=curve, sessions=8), server("b", 0, 8, curve=slow, sessions=8)),
        NEAR,
    )
    assert filled(found, 6)[:4] == ["a", "b", "a", "b"]


def test_over_thin_lines_chains_are_slower():
    two = replace(view(server("a", 0, 8), server("b", 0, 8, 0.0101)), hidden_size=8192)
    thin = replace(two.servers[0], sent_bytes_per_s=1e6)
    assert filled(compose_live(two, NEAR), 1) == ["a"]
    assert filled(compose_live(replace(two, servers=(thin, two.servers[1])), NEAR), 1) == ["b"]


def test_a_server_gets_no_more_than_pays():
    linear = DecodeTimes(points=((1, 0.01), (64, 0.64)))
    assert batch_max(linear) == 1
    assert batch_max(DecodeTimes(points=((1, 0.01),))) == BATCH_MAX
    assert batch_max(DecodeTimes(points=((1, 0.01), (8, 0.0101), (64, 0.08)))) == 8


def test_who_can_not_be_used_now_is_left_out():
    one, other = server("a", 0, 8), server("b", 0, 8, 0.001)
    for bad in (
        replace(other, state="joining"),
        replace(other, state="draining"),
        replace(other, cache_tokens=SESSION_TOKENS - 1),
    ):
        assert filled(compose_live(view(one, bad), NEAR), 1) == ["a"]
    avoiding = replace(NEAR, avoid=frozenset({other.peer}))
    assert filled(compose_live(view(one, other), avoiding), 1) == ["a"]
    assert filled(compose_live(view(one, other), NEAR), 1) == ["b"]


def test_who_alone_has_a_block_keeps_its_seats_while_it_is_full():
    """Without chains the whole line would be sent to it."""
    first, second, only = server("a", 0, 4), server("b", 0, 4), server("c", 4, 8)
    avoiding = replace(NEAR, avoid=frozenset({first.peer, only.peer}))
    found = compose_live(view(first, second, only), avoiding)
    assert filled(found, 9) == ["bc", "bc"], "and who is to be avoided needlessly is not used"


def test_missing_blocks_are_named():
    with pytest.raises(NoRouteError, match=r"\[4,8\)"):
        compose_live(view(server("a", 0, 4)), NEAR)


def test_sessions_on_other_chains_do_not_count():
    found = compose_live(view(server("a", 0, 8)), NEAR)
    stranger = (Stage(peer=PeerId(b"z" * 32), span=Span(0, 8)),)
    assert found.choose([stranger] * 9) is not None


A, B = PeerId(b"a" * 32), PeerId(b"b" * 32)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ([(A, 0, 4), (B, 4, 8)], True),
        ([(A, 0, 3), (B, 3, 8)], False),  # b does not hold block 3
        ([(A, 0, 4)], False),
        ([(A, 0, 4), (B, 5, 8)], False),
        ([(B, 4, 8), (A, 0, 4)], False),
        ([(PeerId(b"z" * 32), 0, 8)], False),
        ([], False),
    ],
)
def test_chains_that_will_do(chain, expected):
    stages = [Stage(peer=peer, span=Span(start, end)) for peer, start, end in chain]
    servers = view(server("a", 0, 4), server("b", 4, 8))
    assert will_do(servers, Span(0, 8), stages, NEAR, ANY_SERVER) is expected
    avoiding = replace(NEAR, avoid=frozenset({B}))
    assert not will_do(servers, Span(0, 8), stages, avoiding, ANY_SERVER)
    assert not will_do(servers, Span(0, 8), stages, NEAR, Wanted(is_exact=True))
