"""What the clients of one address may take together, however many they are."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.base.errors import ConfigError, PeerBusy
from shoal.base.ids import PeerId, SessionId
from shoal.base.spans import Span
from shoal.lab.toy_adapters import toy_adapter
from shoal.lab.toy_backend import ToyBackend, ToyConfig
from shoal.server.adapters import AdapterLimits, AdapterStore
from shoal.server.intake import Intake
from shoal.server.quotas import PLACES_PER_ADDRESS, Line, Quotas
from shoal.server.shares import check_share, left_for, room_for
from shoal.server.training_kept import KeptPasses
from shoal.server.training_room import Pot
from tests.unit.test_server_sessions import NOW_S, PAGE, TOTAL, make_plan, make_table

HERE, ELSEWHERE = "203.0.113.7", "198.51.100.1"
ORIGINS = (None, HERE, ELSEWHERE)
SHARE = 0.5
SPAN = Span(0, 2)
PARTS = [toy_adapter(random.Random(seed), 2) for seed in range(4)]
PART_BYTES = PARTS[0].manifest.num_bytes(SPAN)


def peer(number):
    return PeerId(number.to_bytes(32, "big"))


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, float("nan")])
def test_no_share(share):
    for make in (check_share, lambda share: AdapterLimits(address_share=share)):
        with pytest.raises(ConfigError):
            make(share)


amounts = st.integers(0, 1000)


@given(
    amounts, st.floats(0.01, 1.0), amounts,
    st.lists(st.tuples(st.sampled_from(ORIGINS), amounts)),
)  # fmt: skip
def test_an_address_gets_its_share_and_one_client_what_it_may(total, share, per_client, held):
    room = room_for(total, share, per_client)
    assert min(total, per_client) <= room <= total
    left = left_for(HERE, held, total=total, share=share, per_client=per_client)
    assert left == room - sum(amount for origin, amount in held if origin == HERE)
    assert left_for(None, held, total=total, share=share, per_client=per_client) == total


# --- adapters -------------------------------------------------------------------------

offers = st.lists(
    st.tuples(
        st.integers(0, 20), st.sampled_from(ORIGINS), st.integers(0, 3), st.booleans(),
    ),
    max_size=40,
)  # fmt: skip


@given(offers)
def test_many_identities_keep_no_more_adapters_than_an_address_may(offers):
    """Whatever they bring, use and leave: others find room, unless they filled the rest."""

    async def story():
        used = set()
        limits = AdapterLimits(
            bytes_max=8 * PART_BYTES, bytes_per_client=2 * PART_BYTES, address_share=SHARE
        )
        store = AdapterStore(ToyBackend(ToyConfig(span=SPAN, num_blocks=2)), limits, lambda: used)
        for number, origin, which, is_used in offers:
            owner = peer(3 * number + ORIGINS.index(origin))
            await _bring(store, owner, PARTS[which], origin, used if is_used else set())
            held = store._held()
            assert sum(count for _, count in held) <= limits.bytes_max
            for one in (HERE, ELSEWHERE):
                assert sum(count for origin, count in held if origin == one) <= 4 * PART_BYTES
        if all(origin == HERE for _, origin, _, _ in offers):
            assert await _bring(store, peer(1000), PARTS[0], ELSEWHERE, set())

    asyncio.run(story())


async def _bring(store, owner, part, origin, used):
    manifest = part.manifest
    try:
        await store.admit(owner, manifest.name, manifest.text(), origin)
    except PeerBusy:
        return False
    await store.take(owner, part, SPAN)
    used.add(store.find(owner, manifest.name))
    return True


# --- sessions and streams ---------------------------------------------------------------

wishes = st.lists(
    st.tuples(
        st.integers(0, 20), st.sampled_from(ORIGINS), st.integers(0, 9), st.integers(1, TOTAL)
    ),
    max_size=12,
)


@given(wishes)
def test_many_identities_hold_no_more_cache_than_an_address_may(wishes):
    """However old they say that their sessions are."""
    quotas = Quotas(cache_share=SHARE / 2, address_share=SHARE)
    table = make_table(quotas=quotas)
    for number, (who, origin, opened_ms, pages) in enumerate(wishes, 1):
        owner = bytes([1 + 3 * who + ORIGINS.index(origin)])
        plan = make_plan(number, opened_ms=opened_ms, owner=owner)
        try:
            hop = table.open(plan, None, NOW_S, None, origin)
        except PeerBusy:
            continue
        length = min(pages * PAGE, table.length_max(hop))
        if table.make_room(hop, length, NOW_S) is None and origin is not None:
            is_full = table.ledger.lacking(hop.sequence, length) > 0
            assert is_full or table.is_capped(hop, length) or _has_older(table, hop)
        for one in (HERE, ELSEWHERE):
            held = sum(table.ledger.held(hop.sequence) for hop in table if hop.origin == one)
            assert held <= TOTAL * SHARE
    if all(origin == HERE for _, origin, _, _ in wishes):
        hop = table.open(make_plan(99, opened_ms=10, owner=b"z"), None, NOW_S, None, ELSEWHERE)
        assert table.make_room(hop, table.length_max(hop), NOW_S) == []


def _has_older(table, hop):
    return any(one.origin == hop.origin and one.seniority < hop.seniority for one in table)


def test_streams_of_an_address_are_counted_together():
    table = make_table()
    quotas = Quotas(streams_per_peer=2, streams_per_address=5)
    intake = Intake(quotas, table.facts, table, 1)
    open_streams = [intake.stream(peer(number), HERE) for number in range(5)]
    for stream in open_streams:
        stream.__enter__()
    with pytest.raises(PeerBusy, match="of your address"), intake.stream(peer(9), HERE):
        pass
    for origin in (ELSEWHERE, None):
        with intake.stream(peer(9), origin):
            pass
    open_streams.pop().__exit__(None, None, None)
    with intake.stream(peer(9), HERE):
        pass


# --- training -----------------------------------------------------------------------------


class Pass:
    """A pass under way or kept."""

    def __init__(self):
        self.held_bytes = 0
        self.is_closed = False

    def narrow(self):
        return self.held_bytes

    def close(self):
        self.is_closed = True


passes = st.lists(
    st.tuples(
        st.integers(0, 20), st.sampled_from(ORIGINS), st.sampled_from(["keep", "run", "release"]),
        st.integers(1, 400), st.floats(0.0, 1.0),
    ),
    max_size=30,
)  # fmt: skip


@given(passes)
def test_many_identities_hold_no_more_training_memory_than_an_address_may(passes):
    """An address that holds all it may makes its own passes go, nobody else's."""
    origins = {}
    kept = KeptPasses(300, 1000, origin=origins.get, address_share=SHARE)
    under_way = []
    for number, (who, origin, what, size, part) in enumerate(passes):
        client = peer(3 * who + ORIGINS.index(origin))
        origins[client] = origin
        theirs = [one for one in kept._kept if origins[one[0]] != origin]
        if what == "release" and under_way:
            kept.release(under_way.pop(0))
        elif what == "keep":
            one = Pass()
            one.held_bytes = int(part * kept.room_to_keep(client, size, 0.0))
            kept.keep(client, number, one, None, 0.0)
        elif what == "run":
            try:
                room = kept.room_to_run(client, size, size // 2, 0.0)
            except PeerBusy:
                continue
            one = Pass()
            one.held_bytes = int(part * room)
            kept.reserve(client, one, room)
            under_way.append(one)
        assert kept._free_bytes >= 0
        for one in (HERE, ELSEWHERE):
            assert kept._left_at(one) >= 0
        if what == "keep":
            assert all(one in kept._kept for one in theirs)


class Guest:
    def __init__(self, origin, held):
        self.origin, self.held = origin, held


@given(st.lists(st.tuples(st.sampled_from(ORIGINS), st.integers(1, 40)), max_size=40))
def test_a_pot_keeps_a_rest_for_others(calls):
    pot = Pot[Guest]("calls", 30, 100, lambda guest: guest.held)
    guests = []
    for origin, num_bytes in calls:
        guest = Guest(origin, 0)
        guests.append(guest)
        try:
            pot.check(num_bytes, guest, guests, SHARE)
        except PeerBusy:
            guests.pop()
            continue
        guest.held = num_bytes
    assert sum(one.held for one in guests) <= 100
    for origin in (HERE, ELSEWHERE):
        assert sum(one.held for one in guests if one.origin == origin) <= 50
    if all(origin == HERE for origin, _ in calls):
        newcomer = Guest(ELSEWHERE, 0)
        pot.check(30, newcomer, [*guests, newcomer], SHARE)


def test_who_holds_its_address_share_takes_no_place_in_line():
    """Free pages are kept for those in line, so places of sessions that may not have them would
    keep everybody out."""
    table = make_table(quotas=Quotas(cache_share=SHARE, address_share=SHARE))
    first = table.open(make_plan(1, opened_ms=0, owner=b"a"), None, NOW_S, None, HERE)
    assert table.make_room(first, TOTAL // 2 * PAGE, NOW_S) == []
    for number in range(2, 20):
        plan = make_plan(number, opened_ms=number, owner=bytes([64 + number]))
        with pytest.raises(PeerBusy, match="--address-share"):
            table.open(plan, None, NOW_S, None, HERE)
    assert len(table.line) == 0
    other = table.open(make_plan(50, opened_ms=50, owner=b"o"), None, NOW_S, None, ELSEWHERE)
    assert table.make_room(other, TOTAL // 2 * PAGE, NOW_S) == []


def test_an_address_has_so_many_places_in_line():
    line = Line()
    for number in range(2 * PLACES_PER_ADDRESS):
        line.wait(SessionId(number.to_bytes(16, "big")), peer(number), NOW_S, HERE)
    assert len(line) == PLACES_PER_ADDRESS
    place, _ = line.wait(SessionId(b"s" * 16), peer(1000), NOW_S, ELSEWHERE)
    assert place == PLACES_PER_ADDRESS + 1
    line.wait(SessionId(b"t" * 16), peer(1001), NOW_S)
    assert len(line) == PLACES_PER_ADDRESS + 2


def test_rows_that_wait_are_counted_by_address_too():
    table = make_table(quotas=Quotas(cache_share=1.0))
    quotas = Quotas(queue_bytes_per_client=100, queues_per_address=2)
    intake = Intake(quotas, table.facts, table, 1)
    hops = [
        table.open(make_plan(number, owner=bytes([number])), None, NOW_S, None, origin)
        for number, origin in enumerate([HERE] * 4 + [ELSEWHERE, None], 1)
    ]
    for hop in hops:
        is_taken = intake.takes(hop, 90)
        assert is_taken == (hop not in hops[2:4])
        hop.queue_bytes = 90 * is_taken
    assert intake.overran.is_set()
    assert intake.reopened() == []
    hops[0].queue_bytes = 0
    assert intake.reopened() == hops[2:4]
    assert intake.takes(hops[2], 90)
    for hop in hops[:4]:
        hop.queue_bytes = 0
        table.close(hop)
        intake.forget(hop.plan.owner)
    assert set(intake._queued_at) == {ELSEWHERE}
