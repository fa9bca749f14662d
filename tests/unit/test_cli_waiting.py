"""The line about what an answer waits for: when it comes, what it says, how it goes."""

import asyncio
import io

import pytest

from shoal.base.errors import NoRouteError
from shoal.base.ids import PeerId, SessionId
from shoal.base.spans import Span
from shoal.cli.waiting import GRACE_S, LINE_PERIOD_S, WaitingLine, with_hint
from shoal.client.waiting import Waiting
from shoal.lab.clock import run_virtual
from shoal.plan.view import Stage

ONE, TWO = SessionId(b"1" * 16), SessionId(b"2" * 16)
LOST = Stage(peer=PeerId(b"p" * 32), span=Span(2, 5))


def waiting(start=2, *, deadline_s=60.0, **changes):
    facts = {"missing": (Span(start, 5),), "lost": (LOST,), "reason": "none", "since_s": 0.0}
    return Waiting(**{**facts, "deadline_s": deadline_s, **changes})


def shown(story, *, is_terminal):
    """What a line writes during the story, and how often it asked to begin a line."""
    stream, breaks = io.StringIO(), []

    async def run():
        line = WaitingLine(stream, is_terminal=is_terminal)
        line.break_line = lambda: breaks.append(stream.tell())
        await story(line)

    run_virtual(run)
    return stream.getvalue(), len(breaks)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_short_wait_is_not_worth_a_word(is_terminal):
    async def story(line):
        line.told(ONE, waiting())
        await asyncio.sleep(GRACE_S / 2)
        line.told(ONE, None)
        await asyncio.sleep(10.0)
        line.told(ONE, None)

    assert shown(story, is_terminal=is_terminal) == ("", 0)


def test_in_a_log_it_says_what_how_long_and_when_it_is_over():
    async def story(line):
        for second in range(25):
            line.told(ONE, waiting(2 if second < 15 else 3))
            await asyncio.sleep(1.0)
        line.told(ONE, None)

    text, breaks = shown(story, is_terminal=False)
    first, second, third, last = text.splitlines()
    assert first.startswith("waiting, 59 s left: no server for blocks [2,5); lost: ")
    assert first.endswith(" [2,5)")
    assert second.startswith("waiting, 49 s left: no server for blocks [2,5)")
    assert third.startswith("waiting, 45 s left: no server for blocks [3,5)"), "news come at once"
    assert last == "[waited 25.0 s]"
    assert breaks == 1
    assert LINE_PERIOD_S == 10.0


def test_at_a_terminal_one_line_counts_down_and_goes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")

    async def story(line):
        line.told(ONE, waiting())
        await asyncio.sleep(5.1)
        line.told(ONE, None)

    text, breaks = shown(story, is_terminal=True)
    *pictures, last = text.split("\r\x1b[K")[1:]
    assert pictures[0].startswith("| waiting, 59 s left: no server for")
    assert pictures[-1].startswith("| waiting, 55 s left")
    assert len({picture[0] for picture in pictures}) == 4, "it moves"
    assert max(map(len, pictures)) < 40, "a longer one would leave its first half behind"
    assert last == "[waited 5.1 s]\n"
    assert breaks == 1


def test_nothing_is_said_while_nobody_waits_for_an_answer():
    async def story(line):
        is_answering = False
        line.is_wanted = lambda: is_answering
        line.told(ONE, waiting())
        await asyncio.sleep(20.0)
        is_answering = True
        await asyncio.sleep(1.0)
        line.told(ONE, None)

    text, _ = shown(story, is_terminal=False)
    assert [line.split(":")[0] for line in text.splitlines()] == [
        "waiting, 40 s left",
        "[waited 21.0 s]",
    ]


def test_it_ends_when_no_session_waits():
    async def story(line):
        line.told(ONE, waiting())
        line.told(TWO, waiting(missing=(), lost=(), reason="place 2 in line"))
        await asyncio.sleep(GRACE_S + 0.1)
        line.told(ONE, None)
        await asyncio.sleep(1.0)
        line.told(TWO, None)

    text, _ = shown(story, is_terminal=False)
    assert "place 2 in line" in text
    assert text.splitlines()[-1] == "[waited 2.1 s]"


def test_the_error_names_the_commands_that_help():
    error = with_hint(NoRouteError("waited 1 s", missing=[(0, 2), (5, 7)]), "tiny")
    assert "shoal serve tiny --blocks 0:2 --join ADDR and" in error.detail
    assert "--blocks 5:7" in error.detail
    assert error.missing == ((0, 2), (5, 7))
    plain = NoRouteError("servers keep failing")
    assert with_hint(plain, "tiny") is plain
