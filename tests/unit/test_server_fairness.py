"""When prefill chunks must leave the engine to the answers of others."""

import pytest

from shoal.base.backend import SequenceId
from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.server.fairness import ACTIVE_S, HOLD_MAX, OUTLIER, FairLimits, Fairness, Ran

READER, GREEDY = PeerId(b"r" * 32), PeerId(b"g" * 32)


def wait_s(fairness, owner, now_s):
    return fairness.chunk_waits_s([owner], now_s).get(owner, 0.0)


CHUNK = Ran(SequenceId(1), GREEDY, 2, is_decode=False)


def row(number=2, owner=READER):
    return Ran(SequenceId(number), owner, 2, is_decode=True)


def decode(fairness, start_s, count, owner=READER, step_s=0.2):
    for index in range(count):
        started_s = start_s + index * step_s
        fairness.ran([row(owner=owner)], started_s, started_s + 0.1)
    return start_s + count * step_s


def test_alone_nobody_waits():
    fairness = Fairness(FairLimits())
    now_s = decode(fairness, 0.0, 5, owner=GREEDY)
    fairness.ran([CHUNK], now_s, now_s + 1)
    assert wait_s(fairness, GREEDY, now_s + 1) == 0.0
    assert not fairness.is_in_company([GREEDY], now_s)


def test_after_a_chunk_others_get_tokens_for_its_time():
    fairness = Fairness(FairLimits())
    now_s = decode(fairness, 0.0, 5)
    fairness.ran([CHUNK], now_s, now_s + 0.4)
    now_s += 0.4
    assert fairness.is_in_company([GREEDY], now_s)
    assert wait_s(fairness, READER, now_s) == 0.0
    tokens = 0
    while wait_s(fairness, GREEDY, now_s):
        now_s = decode(fairness, now_s, 1)
        tokens += 1
    assert tokens == 1 + 4  # 0.4 s of delay at each of two hops; a token takes 0.2 s or more


def test_who_stops_decoding_is_waited_for_only_a_while():
    fairness = Fairness(FairLimits())
    now_s = decode(fairness, 0.0, 5)
    fairness.ran([CHUNK], now_s, now_s + 0.4)
    left_s = wait_s(fairness, GREEDY, now_s + 0.4)
    assert 0 < left_s <= ACTIVE_S + 2 * 0.4
    assert wait_s(fairness, GREEDY, now_s + 0.4 + left_s) == 0.0


def test_a_prompt_gets_on_where_hundreds_decode_slowly():
    fairness = Fairness(FairLimits())
    for number in range(300):
        fairness.ran([row(number + 2)], 0.0, 0.001)
    fairness.ran([CHUNK], 0.01, 0.02)
    assert 0 < wait_s(fairness, GREEDY, 0.02) <= HOLD_MAX * 0.01


def test_an_owners_own_chunks_do_not_hold_up_others_for_longer():
    """The cap counts from when somebody waits, whatever runs meanwhile."""
    fairness = Fairness(FairLimits())
    chunk_of_reader = Ran(SequenceId(9), READER, 2, is_decode=False)
    now_s, waited_s = 0.0, None
    while wait_s(fairness, GREEDY, now_s) or waited_s is None:
        fairness.ran([row(), CHUNK] if waited_s is None else [row()], now_s, now_s + 0.1)
        fairness.ran([chunk_of_reader], now_s + 0.1, now_s + 0.3)
        waited_s = now_s
        now_s += 0.3
        assert now_s < 10
    assert waited_s <= HOLD_MAX * 0.3


def test_who_ended_holds_up_nobody():
    fairness = Fairness(FairLimits())
    now_s = decode(fairness, 0.0, 5)
    fairness.ran([CHUNK], now_s, now_s + 0.4)
    assert wait_s(fairness, GREEDY, now_s + 0.4)
    fairness.keep_only({CHUNK.sequence}, {GREEDY})
    assert not wait_s(fairness, GREEDY, now_s + 0.4)
    assert not fairness.is_in_company([GREEDY], now_s + 0.4)


def test_iterations_that_take_no_time_are_no_error():
    fairness = Fairness(FairLimits())
    fairness.ran([row()], 0.0, 0.0)
    fairness.ran([CHUNK], 0.0, 0.0)
    assert wait_s(fairness, GREEDY, 0.0) == 0.0


def test_turns_are_kept_only_of_who_is_here():
    fairness = Fairness(FairLimits())
    fairness.ran([CHUNK], 0.0, 1.0)
    assert fairness.last_chunk_s(GREEDY) == 1.0
    fairness.keep_only(set(), {READER})
    assert fairness.last_chunk_s(GREEDY) == 0.0


@pytest.mark.parametrize("options", [{"rows_per_client": 0}, {"slowdown_max": 1.0}])
def test_limits_that_make_no_sense(options):
    with pytest.raises(ConfigError):
        FairLimits(**options)


def test_a_server_that_stood_still_does_not_hold_chunks_back_for_as_long():
    """Stopped for a minute in the middle of an iteration, as by SIGSTOP."""
    fairness = Fairness(FairLimits())
    now_s = 0.0
    for _ in range(3):
        now_s = decode(fairness, now_s, 2)
        fairness.ran([CHUNK], now_s, now_s + 0.1)
        now_s += 0.1
    now_s = decode(fairness, now_s, 2)
    fairness.ran([CHUNK], now_s, now_s + 60.0)
    now_s = decode(fairness, now_s + 60.0, 1)
    assert 0 < wait_s(fairness, GREEDY, now_s) <= HOLD_MAX * OUTLIER * 0.1
