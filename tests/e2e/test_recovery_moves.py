"""Hot standbys and planned moves between real processes: a death costs a few rows, a drain none."""

from __future__ import annotations

import pytest

from shoal.client.tending import STANDBY_LAG_ROWS
from tests.e2e.processes import wait_until
from tests.e2e.recovery import SAMPLED, draw_prompt, pauses, read, running

pytestmark = pytest.mark.e2e

SERVERS = "a 0:3, b 3:6, a2 0:3, b2 3:6"
TOKENS = 400
KILL_AT = 20
FED_TOKENS = 50
PROMPT = draw_prompt(64)


@pytest.fixture(scope="module")
def living(nursery, exactable_model, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys")
    exact = ("--exact", "always")
    with running(nursery, exactable_model, keys, SERVERS, *exact, encoding="float32") as fleet:
        yield fleet


@pytest.fixture
def fleet(living):
    yield living
    living.restore()


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def undisturbed(request, living):
    options = {"sampler": SAMPLED} if request.param == "sampled" else {}
    return options, read(living, PROMPT, TOKENS, **options)


def standing_by(act):
    """Do it once both hops' standbys have been fed for a while: a busy machine takes its time."""
    fed = []

    def attempt(session):
        if len(session._state.standbys) == 2:
            fed.append(session.length)
        return len(fed) > FED_TOKENS and act(session)

    return attempt


@pytest.mark.parametrize("hop", [0, 1], ids=["first", "last"])
def test_a_standby_takes_over_at_the_price_of_one_run(fleet, undisturbed, hop):
    options, right = undisturbed
    acts = {KILL_AT: standing_by(fleet.kill_hops(hop))}
    answer = read(fleet, PROMPT, TOKENS, acts=acts, standby=1, **options)
    assert answer.token_ids == right.token_ids
    assert answer.numerics == right.numerics == "exact"
    (recovery,) = answer.recoveries
    assert recovery.replayed_tokens <= STANDBY_LAG_ROWS
    print(f"standby: pauses {pauses(answer)}, longest {answer.longest_pause_s:.3f} s")


def test_a_server_that_is_told_to_stop_hands_over(fleet, undisturbed):
    options, right = undisturbed
    left = []

    def leave(session):
        left.append(fleet.chain(session)[1])
        fleet.tell_to_leave(left[0])

    answer = read(fleet, PROMPT, TOKENS, acts={40: leave}, **options)
    assert answer.token_ids == right.token_ids
    assert answer.numerics == "exact"
    assert answer.recoveries == ()
    (move,) = answer.moves
    assert [fleet.name(peer) for peer in move.left] == left
    assert answer.chain[1] not in left
    steady = sorted(answer.pauses_s)[len(answer.pauses_s) // 2]
    print(f"drain: longest pause {answer.longest_pause_s:.3f} s, median {steady:.3f} s")


def test_sessions_are_gone_when_it_has_left(fleet):
    left = []

    def leave(session):
        left.append(fleet.places[fleet.chain(session)[0]].server)
        fleet.tell_to_leave(fleet.chain(session)[0])

    read(fleet, PROMPT, 60, acts={20: leave})
    wait_until(lambda: left[0].process.poll() is not None, "it has ended by itself")
    assert left[0].process.poll() == 0
