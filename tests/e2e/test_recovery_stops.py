"""Servers that stand still or crawl: they accept everything and answer nothing, or late."""

from __future__ import annotations

import signal
import threading

import pytest

from tests.e2e.processes import wait_until
from tests.e2e.recovery import draw_prompt, pauses, read, running

pytestmark = pytest.mark.e2e

SERVERS = "a 0:2, b 2:4, c 4:6, a2 0:2, b2 2:4, c2 4:6"
TOKENS = 50
PROMPT = draw_prompt(40)


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


@pytest.fixture(scope="module")
def undisturbed(living):
    return read(living, PROMPT, TOKENS)


@pytest.mark.parametrize("hop", [0, 1, 2], ids=["first", "middle", "last"])
def test_a_stopped_server_is_replaced_and_wakes_up_in_vain(fleet, undisturbed, hop):
    """The row that it slept over is computed and pushed when it wakes: nobody takes it."""
    stopped = []

    def stop(session):
        stopped.append(fleet.chain(session)[hop])
        fleet.stop(stopped[0])

    acts = {20: stop, 30: lambda session: fleet.resume()}
    answer = read(fleet, PROMPT, TOKENS, acts=acts)
    assert answer.token_ids == undisturbed.token_ids
    assert answer.numerics == undisturbed.numerics
    assert fleet.repairs(answer.recoveries) == [(stopped, [answer.chain[hop]])]
    wait_until(lambda: fleet.settled(stopped[0]), "the session that it slept over is freed")
    print(f"stopped: next token after {answer.longest_pause_s:.2f} s, repair {pauses(answer)}")


def test_one_is_killed_while_another_is_stopped(fleet, undisturbed):
    def act(session):
        first, _, last = fleet.chain(session)
        fleet.stop(last)
        fleet.kill(first)

    answer = read(fleet, PROMPT, TOKENS, acts={20: act})
    assert answer.token_ids == undisturbed.token_ids
    print(f"killed and stopped: next token after {answer.longest_pause_s:.2f} s")


def test_all_hops_are_stopped_for_a_while(fleet, undisturbed):
    """Nobody else is left: the same servers go on when they wake."""

    def stop(session):
        for name in fleet.places:
            fleet.stop(name)
        threading.Timer(3.0, fleet.resume).start()

    answer = read(fleet, PROMPT, TOKENS, acts={20: stop})
    assert answer.token_ids == undisturbed.token_ids
    print(f"all stopped for 3 s: pauses {pauses(answer)}, longest {answer.longest_pause_s:.1f} s")


@pytest.mark.parametrize("stopped_s", [0.1, 0.6])
def test_a_slow_server_is_left_or_waited_for(fleet, undisturbed, stopped_s):
    """It runs 50 ms, then stands still: the text is right either way."""
    is_over = threading.Event()
    slow = []

    def crawl(session):
        slow.append(fleet[fleet.chain(session)[1]])
        threads[0].start()

    def stutter():
        while not is_over.wait(0.05):
            slow[0].signal(signal.SIGSTOP)
            is_over.wait(stopped_s)
            slow[0].signal(signal.SIGCONT)

    threads = [threading.Thread(target=stutter)]
    try:
        answer = read(fleet, PROMPT, TOKENS // 2, acts={10: crawl})
    finally:
        is_over.set()
        threads[0].join()
    assert answer.token_ids == undisturbed.token_ids[: TOKENS // 2]
    print(
        f"stopped {stopped_s} of {stopped_s + 0.05} s: repairs "
        f"{fleet.repairs(answer.recoveries)}, longest pause {answer.longest_pause_s:.2f} s"
    )
