"""Reading a route: what it gives us to do, and every reason to refuse it."""

import pytest
from msgspec import structs

from shoal.base.errors import BadInput, ModelUnknown, PeerRefused, ProtocolError
from shoal.base.ids import session_id
from shoal.base.spans import Span
from shoal.lab.toy_backend import MODEL, ToyBackend, ToyConfig
from shoal.net.identity import RECORD, ROUTE, Identity
from shoal.server.routes import read_route
from shoal.server.session import Feed
from shoal.wire.messages import Fork, Hop, Route, RouteBody, Standby, encode

OWNER = Identity.from_seed(b"o" * 32)
OTHER = Identity.from_seed(b"x" * 32)
ME, LEFT, RIGHT = (Identity.from_seed(bytes([n]) * 32).peer for n in (1, 2, 3))
FACTS = ToyBackend(ToyConfig(span=Span(2, 8), num_blocks=10)).facts
NONCE = b"n" * 16


def hop(peer, start, end, encoding="float32"):
    return Hop(peer, start, end, encoding)


def body(*hops, **changes):
    hops = list(hops) or [hop(LEFT, 0, 2), hop(ME, 2, 6), hop(RIGHT, 6, 10)]
    made = RouteBody(OWNER.peer, NONCE, 4, MODEL, 1234, hops)
    return structs.replace(made, **changes)


def read(route_body, *, signer=OWNER, sender=OWNER.peer, context=ROUTE):
    data = encode(route_body)
    route = Route(1, data, signer.sign(context, data))
    return read_route(route, sender, ME, FACTS)


def test_a_hop_knows_its_place():
    plan = read(body(parent=Fork(b"p" * 16, 2, 30)))
    assert (plan.session, plan.epoch) == (session_id(OWNER.peer, NONCE), 4)
    assert plan.parent == Fork(b"p" * 16, 2, 30)
    (mine,) = plan.hops
    assert (mine.span, mine.encoding, mine.is_last) == (Span(2, 6), "float32", False)
    assert (mine.predecessor, mine.successor) == (LEFT, RIGHT)
    assert (mine.owner, mine.opened_ms, mine.epoch) == (OWNER.peer, 1234, 4)


def test_the_owner_stands_at_both_ends():
    (mine,) = read(body(hop(ME, 2, 8))).hops
    assert (mine.predecessor, mine.successor, mine.is_last) == (OWNER.peer, OWNER.peer, True)


def test_one_server_may_have_two_hops():
    plan = read(body(hop(ME, 2, 3), hop(RIGHT, 3, 6), hop(ME, 6, 8)))
    assert [(one.span, one.is_last) for one in plan.hops] == [
        (Span(2, 3), False),
        (Span(6, 8), True),
    ]


def test_the_owner_may_relay_between_two_servers():
    plan = read(body(hop(LEFT, 0, 2), hop(OWNER.peer, 2, 2), hop(ME, 2, 8)))
    assert plan.hops[0].predecessor == OWNER.peer


@pytest.mark.parametrize(
    "how",
    [
        {"signer": OTHER},
        {"sender": OTHER.peer},
        {"signer": OTHER, "sender": OTHER.peer},
        {"context": RECORD},
    ],
    ids=["forged", "passed on", "somebody else's", "signed as something else"],
)
def test_only_the_owner_routes_its_session(how):
    with pytest.raises(PeerRefused, match="signed and sent by"):
        read(body(), **how)


def test_a_changed_body_is_refused():
    data = encode(body())
    route = Route(1, encode(body(epoch=5)), OWNER.sign(ROUTE, data))
    with pytest.raises(PeerRefused):
        read_route(route, OWNER.peer, ME, FACTS)


def test_bytes_that_are_no_body():
    for data in (b"", b"\xff" * 20, encode(body())[:-1]):
        with pytest.raises(ProtocolError, match="malformed"):
            read_route(Route(1, data, OWNER.sign(ROUTE, data)), OWNER.peer, ME, FACTS)


@pytest.mark.parametrize(
    ("hops", "message"),
    [
        ([hop(ME, 6, 2)], "a hop over blocks"),
        ([hop(LEFT, 2, 2), hop(ME, 2, 6)], "a hop over blocks"),
        ([hop(ME, 2, 4), hop(RIGHT, 5, 6)], "ends at block 4, the next begins at 5"),
        ([hop(ME, 2, 4), hop(RIGHT, 3, 6)], "ends at block 4, the next begins at 3"),
    ],
    ids=["backwards", "a stranger's relay", "gap", "overlap"],
)
def test_hops_that_are_no_chain(hops, message):
    with pytest.raises(ProtocolError, match=message):
        read(body(*hops))


@pytest.mark.parametrize(
    ("hops", "message"),
    [
        ([hop(ME, 1, 6)], r"\[1,6\) are not served here"),
        ([hop(ME, 2, 9)], r"we have \[2,8\)"),
        ([hop(ME, 2, 6, "float16")], "we have float32, bfloat16"),
        ([hop(RIGHT, 2, 6)], "no hop for us"),
    ],
    ids=["before", "behind", "encoding", "not us"],
)
def test_what_we_do_not_serve(hops, message):
    with pytest.raises(BadInput, match=message):
        read(body(*hops))


def test_another_model():
    with pytest.raises(ModelUnknown, match="this is toy"):
        read(body(model="another"))


@pytest.mark.parametrize("span", [(0, 4), (4, 10)])
def test_sessions_and_forks_of_blocks_that_we_leave_may_go_on(span):
    """`runs` knows one session that runs just these blocks here."""
    before = [hop(LEFT, 0, span[0])] if span[0] else []
    after = [hop(RIGHT, span[1], 10)] if span[1] < 10 else []
    made = body(*before, hop(ME, *span), *after)
    route = Route(1, encode(made), OWNER.sign(ROUTE, encode(made)))
    session = session_id(OWNER.peer, NONCE)
    with pytest.raises(BadInput, match=r"not served here \(we have \[2,8\)\)"):
        read_route(route, OWNER.peer, ME, FACTS, lambda one, blocks: one != session)
    asked = []
    plan = read_route(
        route, OWNER.peer, ME, FACTS, lambda one, blocks: asked.append((one, blocks)) or True
    )
    assert [one.span for one in plan.hops] == [Span(*span)]
    assert asked == [(session, Span(*span))]
    made = structs.replace(made, parent=Fork(b"p" * 16, 2, 30))
    route = Route(1, encode(made), OWNER.sign(ROUTE, encode(made)))
    read_route(route, OWNER.peer, ME, FACTS, lambda one, blocks: one == b"p" * 16)


# --- standbys ------------------------------------------------------------------------


def beside(*standbys):
    return body(hop(LEFT, 0, 2), hop(RIGHT, 2, 10), standbys=list(standbys))


def test_a_standby_is_fed_by_who_ends_where_it_begins():
    (mine,) = read(beside(Standby(ME, 2, 6, "float32", 16))).hops
    assert mine.is_standby
    assert (mine.predecessor, mine.span, mine.is_last) == (LEFT, Span(2, 6), False)
    assert mine.feeds == ()


def test_a_hop_feeds_the_standbys_behind_it():
    route = body(hop(ME, 2, 4), hop(RIGHT, 4, 8), standbys=[Standby(LEFT, 4, 8, "float32", 16)])
    (mine,) = read(route).hops
    assert mine.feeds == (Feed(peer=LEFT, lag_rows=16),)
    assert not mine.is_standby


def test_a_standby_feeds_the_next_unless_a_hop_does():
    route = beside(Standby(ME, 2, 6, "float32"), Standby(LEFT, 6, 10, "float32"))
    (mine,) = read(route).hops
    assert mine.feeds == (Feed(peer=LEFT, lag_rows=0),)


def test_the_owner_feeds_who_begins_where_the_chain_does():
    route = body(hop(RIGHT, 2, 8), standbys=[Standby(ME, 2, 8, "float32")])
    (mine,) = read(route).hops
    assert (mine.predecessor, mine.is_last) == (OWNER.peer, True)


@pytest.mark.parametrize(
    ("standbys", "message"),
    [
        ([(ME, 3, 6)], "nobody feeds"),
        ([(ME, 6, 6)], "a standby over blocks"),
        ([(OWNER.peer, 2, 6)], "a standby over blocks"),
        ([(ME, 2, 6), (ME, 2, 4)], "begin or end at the same block"),
        ([(RIGHT, 2, 6)], "begin or end at the same block"),
        ([(bytes([n]) * 32, 2, 6) for n in range(5)], "more than 4 standbys"),
    ],
    ids=["unfed", "empty", "the owner", "twice", "beside itself", "too many"],
)
def test_standbys_that_can_not_be(standbys, message):
    with pytest.raises(ProtocolError, match=message):
        read(beside(*(Standby(*one, "float32") for one in standbys)))


def test_a_standby_is_judged_like_a_hop():
    with pytest.raises(BadInput, match="not served here"):
        read(beside(Standby(ME, 2, 10, "float32")))
    with pytest.raises(BadInput, match="encoding"):
        read(beside(Standby(ME, 2, 6, "float8")))
