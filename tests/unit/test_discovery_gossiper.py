"""The rules of gossip, one event at a time: what is said, wanted, refused and suspected."""

from __future__ import annotations

import pytest

from shoal.base.errors import PeerMisbehaved, ProtocolError
from shoal.base.limits import GOSSIP_BEAT_S, RECORD_TTL_S
from shoal.discovery.allowance import RECORDS_BURST, UPDATES_BURST
from shoal.discovery.gossiper import (
    DOUBT_AFTER_S,
    PROBE_TIMEOUT_S,
    RECONNECT_S,
    ROTATE_S,
    SHUN_S,
    SILENCE_S,
    SUSPECTS_GAP_S,
    TICK_S,
)
from shoal.discovery.neighbourhood import (
    SUSPECTS_BURST,
    Action,
    Dial,
    Drop,
)
from shoal.discovery.neighbours import SERVER_DIALS
from shoal.discovery.spreading import (
    BAD_MAX,
    DIGEST_PERIOD_S,
    OFFER_GAP_S,
    WANT_TIMEOUT_S,
)
from shoal.discovery.store import RESTORE_AFTER_S, SUSPECT_S, RecordStore
from shoal.wire.directory import Records
from shoal.wire.gossip import Beat, Digest, Offer, Part, RecordName, Suspects, Taken, WantRecords
from shoal.wire.messages import Ping
from tests.unit.discovery_cases import SWARM, identity, signed
from tests.unit.gossip_cases import ANN, BOB, CAT, DAN, EVE, ME, Scene, dials, name, said


def test_news_are_offered_to_all_but_who_brought_them() -> None:
    scene = Scene(ANN.peer, BOB.peer, CAT.peer)
    news = signed(EVE, 1)
    actions = scene.hear(ANN.peer, Records(0, [news]))
    assert said(actions, Offer) == [
        (BOB.peer, Offer([name(news)])),
        (CAT.peer, Offer([name(news)])),
    ]


def test_news_are_gathered_while_others_have_just_been_offered() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    scene.hear(ANN.peer, Records(0, [signed(EVE, 1)]))
    assert not said(scene.hear(ANN.peer, Records(0, [signed(EVE, 2)])), Offer)
    assert not said(scene.hear(ANN.peer, Records(0, [signed(DAN, 1)])), Offer)
    offers = said(scene.wait(OFFER_GAP_S, [ANN.peer, BOB.peer]), Offer)
    assert offers == [(BOB.peer, Offer([name(signed(EVE, 2)), name(signed(DAN, 1))]))]


def test_who_offers_what_we_were_about_to_offer_is_spared() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    scene.hear(ANN.peer, Records(0, [signed(EVE, 1)]))
    scene.hear(ANN.peer, Records(0, [signed(DAN, 1)]))
    scene.hear(BOB.peer, Offer([name(signed(DAN, 1))]))
    assert not said(scene.wait(3, [ANN.peer, BOB.peer]), Offer)


def test_what_is_lacking_is_wanted_once() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    offer = Offer([name(signed(EVE, 1))])
    assert said(scene.hear(ANN.peer, offer), WantRecords) == [(ANN.peer, WantRecords([EVE.peer]))]
    assert not said(scene.hear(BOB.peer, offer), WantRecords)
    later = said(scene.wait(WANT_TIMEOUT_S, [ANN.peer, BOB.peer]), WantRecords)
    assert later == [(BOB.peer, WantRecords([EVE.peer]))], "the other one is asked"
    assert not said(scene.wait(2 * WANT_TIMEOUT_S, [ANN.peer, BOB.peer]), WantRecords)


def test_wants_are_answered_with_the_signed_bytes_and_their_age() -> None:
    scene = Scene(ANN.peer)
    scene.store.accept(signed(EVE, 1), scene.now_s, 100.0)
    scene.now_s += 20
    ((_, answer),) = said(scene.hear(ANN.peer, WantRecords([EVE.peer, DAN.peer])), Records)
    assert (answer.records, answer.ages_s) == ([signed(EVE, 1)], [120.0])


def test_an_old_offer_is_answered_by_a_better_one() -> None:
    scene = Scene(ANN.peer)
    scene.store.accept(signed(EVE, 5), scene.now_s)
    answers = said(scene.hear(ANN.peer, Offer([name(signed(EVE, 4))])), Offer)
    assert answers == [(ANN.peer, Offer([name(signed(EVE, 5))]))]


def test_digests_lead_to_what_differs_both_ways() -> None:
    scene, other = Scene(), RecordStore(SWARM)
    for data in (signed(EVE, 1), signed(DAN, 2)):
        scene.store.accept(data, scene.now_s)
    scene.gossiper.joined(ANN.peer, scene.now_s, is_dialled=False)
    for data in (signed(EVE, 1), signed(CAT, 1)):
        other.accept(data, scene.now_s)
    ((_, offer),) = said(scene.hear(ANN.peer, Digest(other.digest.pack())), Offer)
    assert offer.names == [name(signed(DAN, 2))]
    assert set(offer.buckets) == {DAN.peer[-1] % 64, CAT.peer[-1] % 64}
    theirs = Offer([name(signed(CAT, 1))], offer.buckets)
    answers = scene.hear(ANN.peer, theirs)
    assert said(answers, WantRecords) == [(ANN.peer, WantRecords([CAT.peer]))]
    assert [message.names for _, message in said(answers, Offer)] == [[name(signed(DAN, 2))]]
    assert not scene.hear(ANN.peer, Digest(scene.store.digest.pack()))


def test_a_new_stream_begins_with_the_dialler_s_digest_and_others_follow() -> None:
    scene = Scene()
    assert len(said(scene.gossiper.joined(ANN.peer, 0.0, is_dialled=True), Digest)) == 1
    assert not said(scene.gossiper.joined(BOB.peer, 0.0, is_dialled=False), Digest)
    actions = scene.wait(3 * DIGEST_PERIOD_S, [ANN.peer, BOB.peer])
    assert 2 <= len(said(actions, Digest)) <= 4


def test_our_own_record_goes_to_all_at_once() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    scene.store.accept(signed(ME, 1), scene.now_s)
    own = scene.store.find(ME.peer)
    assert own is not None
    told, actions = scene.gossiper.publish(own, 3, scene.now_s)
    assert told == [ANN.peer, BOB.peer]
    assert said(actions, Records) == [(peer, Records(3, [own.data])) for peer in told]
    assert said(scene.hear(ANN.peer, Records(4, [signed(EVE, 1)])), Taken) == [(ANN.peer, Taken(4))]


# --- what is refused --------------------------------------------------------------------


def forged() -> bytes:
    data = bytearray(signed(EVE, 9))
    data[-1] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "counted"),
    [
        (forged(), "protocol"),
        (b"junk", "protocol"),
        (bytes(17 << 10), "too_large"),
        (signed(EVE, 1, swarm="other"), "refused"),
        (signed(DAN, 3), "stale"),
        (signed(DAN, 4), "repeated"),
        (signed(DAN, 4, model="other"), "stale"),
    ],
)
def test_bad_old_and_repeated_records_change_nothing(data: bytes, counted: str) -> None:
    scene = Scene(ANN.peer)
    scene.store.accept(signed(DAN, 4), scene.now_s)
    version = scene.store.version
    scene.hear(ANN.peer, Records(0, [data]))
    assert scene.store.version == version
    assert scene.counts == {counted: 1}


def test_who_hands_over_bad_records_again_and_again_is_shunned() -> None:
    scene = Scene(ANN.peer)
    scene.hear(ANN.peer, Records(0, [forged()] * (BAD_MAX - 1)))
    with pytest.raises(PeerMisbehaved, match="8 bad records"):
        scene.hear(ANN.peer, Records(0, [forged()]))
    scene.store.accept(signed(ANN, 1), scene.now_s)
    scene.gossiper.shun(ANN.peer, scene.now_s)
    assert "bad records" in scene.gossiper.admits(ANN.peer, scene.now_s)
    assert not dials(scene.wait(60))
    assert scene.gossiper.admits(ANN.peer, scene.now_s + SHUN_S) == ""


def test_a_flood_of_records_by_one_peer_is_bounded() -> None:
    scene = Scene(ANN.peer)
    for counter in range(3 * UPDATES_BURST):
        scene.hear(ANN.peer, Records(0, [signed(EVE, counter)]))
    assert scene.counts["news"] == UPDATES_BURST + 1
    assert scene.counts["flood"] == 2 * UPDATES_BURST - 1
    scene.now_s += 10.0
    scene.hear(ANN.peer, Records(0, [signed(EVE, 99)]))
    assert scene.store.sequence(EVE.peer) == (1_000, 99), "and it may go on later"


def test_a_flood_of_names_and_wants_is_bounded() -> None:
    scene = Scene(ANN.peer)
    for start in range(0, 3 * RECORDS_BURST, 1000):
        names = [RecordName(i.to_bytes(32, "big"), 1, 1) for i in range(start, start + 1000)]
        scene.hear(ANN.peer, Offer(names))
    assert scene.counts["flood"] > 2 * RECORDS_BURST
    scene.store.accept(signed(EVE, 1), scene.now_s)
    served = 0
    for _ in range(4):
        answers = said(scene.hear(ANN.peer, WantRecords([EVE.peer] * RECORDS_BURST)), Records)
        served += sum(len(answer.records) for _, answer in answers)
    assert served == 2 * RECORDS_BURST


def test_a_flood_of_suspicions_is_bounded() -> None:
    scene = Scene(ANN.peer)
    scene.hear(ANN.peer, Suspects([name(signed(EVE, 1))] * (SUSPECTS_BURST + 5)))
    assert scene.counts["flood"] == 1


def test_other_messages_have_no_place_here() -> None:
    with pytest.raises(ProtocolError, match="Ping"):
        Scene(ANN.peer).hear(ANN.peer, Ping(1))


def test_nothing_is_heard_from_who_is_no_neighbour() -> None:
    scene = Scene()
    assert not scene.hear(ANN.peer, Records(0, [signed(EVE, 1)]))
    assert scene.store.version == 0


# --- liveness ----------------------------------------------------------------------------


def test_beats_go_out_only_in_silence() -> None:
    scene = Scene(ANN.peer)
    assert len(said(scene.wait(10 * GOSSIP_BEAT_S, [ANN.peer]), Beat)) in (9, 10)


def silenced(scene: Scene) -> list[Action]:
    """ANN, a server, says nothing any more; BOB does."""
    scene.store.accept(signed(ANN, 1), scene.now_s)
    return scene.wait(SILENCE_S + TICK_S, [BOB.peer])


def test_a_silent_neighbour_is_dialled_and_then_suspected() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    actions = silenced(scene)
    assert [a.peer for a in actions if isinstance(a, Drop)] == [ANN.peer]
    (probe,) = [a for a in actions if isinstance(a, Dial)]
    assert (probe.peer, probe.timeout_s) == (ANN.peer, PROBE_TIMEOUT_S)
    assert not said(actions, Suspects)
    accusation = said(scene.gossiper.undialled(ANN.peer, scene.now_s), Suspects)
    assert accusation == [(BOB.peer, Suspects([name(signed(ANN, 1))]))]
    assert scene.store.snapshot().suspects == {ANN.peer}
    scene.wait(SUSPECT_S, [BOB.peer])
    assert not scene.store.snapshot().records


def test_a_silent_neighbour_that_can_be_dialled_lives() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    silenced(scene)
    assert not said(scene.gossiper.joined(ANN.peer, scene.now_s, is_dialled=True), Suspects)
    assert not scene.store.snapshot().suspects


def test_a_client_that_vanishes_is_nobody_s_business() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    assert not dials(scene.gossiper.left(ANN.peer, scene.now_s))


def test_a_client_keeps_its_suspicions_to_itself() -> None:
    scene = Scene(ANN.peer, BOB.peer, is_reader=True)
    silenced(scene)
    assert not said(scene.gossiper.undialled(ANN.peer, scene.now_s), Suspects)
    assert scene.store.snapshot().suspects == {ANN.peer}


def test_who_slept_itself_suspects_nobody() -> None:
    scene = Scene(ANN.peer)
    scene.store.accept(signed(ANN, 1), scene.now_s)
    scene.wait(1, [ANN.peer])
    scene.now_s += 60.0
    assert not dials(scene.gossiper.tick(scene.now_s))
    assert ANN.peer in scene.gossiper.neighbours


def test_who_parts_is_not_suspected() -> None:
    scene = Scene(ANN.peer)
    scene.store.accept(signed(ANN, 1), scene.now_s)
    actions = scene.hear(ANN.peer, Part())
    assert actions == [Drop(ANN.peer, "it parted", is_polite=False)]


def test_suspicions_travel_on_once_and_are_gathered() -> None:
    scene = Scene(ANN.peer, BOB.peer, CAT.peer)
    for who in (DAN, EVE):
        scene.store.accept(signed(who, 1), scene.now_s)
    first = scene.hear(ANN.peer, Suspects([name(signed(EVE, 1))]))
    assert [peer for peer, _ in said(first, Suspects)] == [BOB.peer, CAT.peer]
    assert not said(scene.hear(BOB.peer, Suspects([name(signed(EVE, 1))])), Suspects)
    assert not said(scene.hear(ANN.peer, Suspects([name(signed(DAN, 1))])), Suspects)
    later = said(scene.wait(SUSPECTS_GAP_S, [ANN.peer, BOB.peer, CAT.peer]), Suspects)
    assert later == [(peer, Suspects([name(signed(DAN, 1))])) for peer in (BOB.peer, CAT.peer)]


@pytest.mark.parametrize("counter", [0, 2], ids=["an earlier record", "a record nobody has"])
def test_a_suspicion_of_another_record_says_nothing(counter: int) -> None:
    scene = Scene(ANN.peer, BOB.peer)
    scene.store.accept(signed(EVE, 1), scene.now_s)
    actions = scene.hear(ANN.peer, Suspects([name(signed(EVE, counter))]))
    assert not scene.store.snapshot().suspects
    assert not said(actions, Suspects)
    assert bool(said(actions, Offer)) == (counter == 0), "the later record is offered"


def test_a_later_record_refutes() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    scene.store.accept(signed(EVE, 1), scene.now_s)
    scene.hear(ANN.peer, Suspects([name(signed(EVE, 1))]))
    scene.hear(BOB.peer, Records(0, [signed(EVE, 2)]))
    scene.wait(2 * SUSPECT_S, [ANN.peer, BOB.peer])
    assert scene.store.sequence(EVE.peer) == (1_000, 2)
    assert len(scene.store.snapshot().records) == 1


def test_we_are_told_that_we_are_suspected() -> None:
    scene = Scene(ANN.peer)
    scene.store.accept(signed(ME, 3), scene.now_s)
    scene.hear(ANN.peer, Suspects([name(signed(ME, 2))]))
    accused = [scene.gossiper.accused]
    scene.hear(ANN.peer, Suspects([name(signed(ME, 3))]))
    accused.append(scene.gossiper.accused)
    scene.store.accept(signed(ME, 4), scene.now_s)
    accused.append(scene.gossiper.accused)
    assert accused == [False, True, False]


def test_nobody_is_suspected_whom_we_hear() -> None:
    """The suspicion stops here; its subject is told once."""
    scene = Scene(ANN.peer, BOB.peer)
    scene.store.accept(signed(BOB, 1), scene.now_s)
    suspicion = Suspects([name(signed(BOB, 1))])
    assert said(scene.hear(ANN.peer, suspicion), Suspects) == [(BOB.peer, suspicion)]
    assert not said(scene.hear(ANN.peer, suspicion), Suspects)
    assert not scene.store.snapshot().suspects


def dropped(scene: Scene) -> None:
    """EVE's record is held, suspected and dropped."""
    scene.store.accept(signed(EVE, 1), scene.now_s)
    scene.hear(ANN.peer, Suspects([name(signed(EVE, 1))]))
    scene.wait(SUSPECT_S, [ANN.peer, BOB.peer])
    assert not scene.store.snapshot().records


def test_who_is_behind_is_told_that_a_server_has_gone() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    dropped(scene)
    offer = Offer([name(signed(EVE, 1))])
    assert said(scene.hear(BOB.peer, offer), Suspects) == [(BOB.peer, Suspects(offer.names))]
    assert not scene.store.snapshot().records


def test_who_holds_it_long_after_may_be_right() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    dropped(scene)
    scene.wait(RESTORE_AFTER_S, [ANN.peer, BOB.peer])
    actions = scene.hear(BOB.peer, Offer([name(signed(EVE, 1))]))
    assert len(scene.store.snapshot().records) == 1
    assert [peer for peer, _ in said(actions, Offer)] == [ANN.peer]
    scene.store.expire(1000.0 + RECORD_TTL_S)
    assert not scene.store.snapshot().records, "its life is none the longer"


def test_lost_servers_are_dialled_now_and_then() -> None:
    scene = Scene(ANN.peer, BOB.peer)
    dropped(scene)
    actions = scene.wait(3 * RECONNECT_S, [ANN.peer, BOB.peer])
    assert dials(actions) == [EVE.peer]
    (dial,) = [a for a in actions if isinstance(a, Dial)]
    assert dial.addresses


def test_neighbours_are_dialled_and_one_is_exchanged_now_and_then() -> None:
    scene = Scene()
    for number in range(10, 30):
        scene.store.accept(signed(identity(number)), scene.now_s)
    chosen = dials(scene.wait(TICK_S))
    assert len(chosen) == SERVER_DIALS
    for peer in chosen:
        scene.gossiper.joined(peer, scene.now_s, is_dialled=True)
    assert not dials(scene.wait(0.5 * ROTATE_S, chosen))
    (another,) = dials(scene.wait(0.8 * ROTATE_S, chosen))
    actions = scene.gossiper.joined(another, scene.now_s, is_dialled=True)
    assert [(a.peer in chosen, a.is_polite) for a in actions if isinstance(a, Drop)] == [
        (True, True)
    ]


def test_a_server_that_does_not_answer_is_not_chosen_again_at_once() -> None:
    scene = Scene()
    scene.store.accept(signed(EVE, 1), scene.now_s)
    assert dials(scene.wait(TICK_S)) == [EVE.peer]
    assert not scene.gossiper.undialled(EVE.peer, scene.now_s)
    assert not dials(scene.wait(4))
    assert dials(scene.wait(4)) == [EVE.peer]
    assert not scene.store.snapshot().suspects, "it was no neighbour: it may be our own network"


def test_a_server_of_which_nothing_was_heard_for_long_is_suspected_when_dialling_fails() -> None:
    scene = Scene(ANN.peer)
    scene.store.accept(signed(EVE, 1), scene.now_s, DOUBT_AFTER_S + 1)
    assert dials(scene.wait(TICK_S, [ANN.peer])) == [EVE.peer]
    accusation = said(scene.gossiper.undialled(EVE.peer, scene.now_s), Suspects)
    assert accusation == [(ANN.peer, Suspects([name(signed(EVE, 1))]))]
