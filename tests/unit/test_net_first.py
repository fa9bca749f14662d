"""Several addresses of one server: the first that answers, without waiting for dead ones."""

import asyncio

import pytest

from shoal.base.errors import PeerRefused, PeerTimeout, PeerUnreachable
from shoal.lab.clock import run_virtual
from shoal.net.first import STAGGER_S, first_of


def way(name, after_s, error=None):
    async def go():
        await asyncio.sleep(after_s)
        if error is not None:
            raise error
        return name

    return go


@pytest.mark.parametrize(
    ("ways", "found", "took_s"),
    [
        ([way("a", 0.2), way("b", 0.1)], "a", 0.2),
        ([way("a", 5.0, PeerTimeout("")), way("b", 0.1)], "b", STAGGER_S + 0.1),
        ([way("a", 0.1, PeerUnreachable("")), way("b", 0.1)], "b", 0.2),
        ([way("a", 1.5), way("b", 3.0)], "a", 1.5),  # slow, but before the other
        ([way("a", 9.0), way("b", 9.0), way("c", 0.5)], "c", 2 * STAGGER_S + 0.5),
        ([way("a", 0.3)], "a", 0.3),
    ],
)
def test_the_first_that_works_counts(ways, found, took_s):
    async def work():
        began_s = asyncio.get_running_loop().time()
        assert await first_of(ways, lambda late: None) == found
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(took_s)
        assert len(asyncio.all_tasks()) == 1  # nothing is left behind

    run_virtual(work)


def test_who_works_too_late_is_dropped():
    dropped = []

    async def work():
        ways = [way("a", STAGGER_S + 0.5), way("b", 0.5)]
        await first_of(ways, dropped.append)
        await asyncio.sleep(5.0)

    run_virtual(work)
    assert dropped in (["a"], ["b"])


def test_none_works():
    async def work():
        ways = [way("a", 5.0, PeerTimeout("a")), way("b", 0.1, PeerRefused("b"))]
        with pytest.raises(PeerTimeout):
            await first_of(ways, lambda late: None)
        with pytest.raises(ValueError, match="no ways"):
            await first_of([], lambda late: None)

    run_virtual(work)


def test_who_gives_up_leaves_nothing_behind():
    async def work():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await first_of([way("a", 5.0), way("b", 5.0)], lambda late: None)
        assert len(asyncio.all_tasks()) == 1

    run_virtual(work)


@pytest.mark.parametrize("stubborn_s", [0.0, 3.0])
def test_who_gives_up_at_the_last_moment_leaves_nothing_behind_either(stubborn_s):
    """The first has worked, but another that is too late takes its time to end."""
    dropped = []

    async def stubborn():
        try:
            await asyncio.sleep(60.0)
        finally:
            await asyncio.sleep(stubborn_s)

    async def work():
        both = asyncio.ensure_future(first_of([stubborn, way("b", 0.5)], dropped.append))
        if not stubborn_s:
            assert await both == "b"
            assert dropped == []
            return
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(STAGGER_S + 1.0):
                await both
        assert dropped == ["b"]

    run_virtual(work)
