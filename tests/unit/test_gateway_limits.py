"""Keys, allowances, the line, and sessions at rest."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shoal.base.errors import ConfigError
from shoal.base.ids import SessionId
from shoal.gateway.errors import ApiError
from shoal.gateway.kept import Kept, KeptConfig, KeptSessions
from shoal.gateway.keys import ANYBODY, Allowance, Caller, Keys, hash_of, read_keys
from shoal.gateway.line import Line, LineConfig

KEY = "sk-0123456789abcdef"


def written(folder: Path, text: str) -> Path:
    path = folder / "keys.toml"
    path.write_text(text)
    return path


def test_keys_are_found_by_what_is_sent(tmp_path: Path) -> None:
    text = f'[alice]\nkey = "{KEY}"\nat_once = 2\n[bob]\nkey_sha256 = "{hash_of("b" * 20)}"\n'
    keys = read_keys(written(tmp_path, text))
    assert keys.find(f"Bearer {KEY}") == Caller(name="alice", at_once=2)
    assert keys.find(f"bearer {'b' * 20}").name == "bob"
    for sent in (None, "", "Bearer", "Basic abc", "Bearer wrong", KEY):
        with pytest.raises(ApiError) as caught:
            keys.find(sent)
        assert caught.value.status == 401
        assert caught.value.headers() == {"WWW-Authenticate": "Bearer"}
    assert Keys({}).find(None) is ANYBODY


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no key"),
        ("key = 3", "is no section"),
        ("[a]", "either key or key_sha256"),
        ('[a]\nkey = "short"', "at least 16"),
        ('[a]\nkey_sha256 = "zz"', "64 hex"),
        (f'[a]\nkey = "{KEY}"\nat_onse = 3', "unknown at_onse"),
        (f'[a]\nkey = "{KEY}"\nat_once = 0', "at_once is a number"),
        (f'[a]\nkey = "{KEY}"\nat_once = true', "at_once is a number"),
        (f'[a]\nkey = "{KEY}"\n[b]\nkey = "{KEY}"', "the key of"),
        ("[", "can't read"),
    ],
)
def test_a_file_of_keys_that_can_not_be(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_keys(written(tmp_path, text))


def test_requests_and_tokens_of_a_minute() -> None:
    allowance = Allowance()
    caller = Caller(name="a", requests_per_minute=2, tokens_per_minute=100)
    allowance.take_request(caller, 0.0)
    allowance.take_request(caller, 0.0)
    with pytest.raises(ApiError) as caught:
        allowance.take_request(caller, 1.0)
    assert caught.value.status == 429
    assert float(caught.value.headers()["Retry-After"]) >= 28
    allowance.take_request(caller, 31.0)
    allowance.use_tokens(caller, 300, 31.0)
    with pytest.raises(ApiError, match="100 tokens"):
        allowance.take_request(caller, 90.0)
    allowance.take_request(caller, 300.0)
    allowance.take_request(Caller(name="b"), 0.0)


def test_callers_take_turns() -> None:
    async def run() -> list[str]:
        line = Line(LineConfig(places=1))
        done: list[str] = []
        first = asyncio.Event()

        async def ask(name: str) -> None:
            async with line.place(Caller(name=name[0])):
                done.append(name)
                if name == "a0":
                    await first.wait()

        tasks = []
        for name in ("a0", "a1", "a2", "a3", "b1", "c1"):
            tasks.append(asyncio.create_task(ask(name)))
            await asyncio.sleep(0)
        assert (line.num_running, line.num_waiting) == (1, 5)
        first.set()
        await asyncio.gather(*tasks)
        assert (line.num_running, line.num_waiting) == (0, 0)
        return done

    assert asyncio.run(run()) == ["a0", "a1", "b1", "c1", "a2", "a3"]


def test_a_line_has_an_end() -> None:
    async def run() -> None:
        line = Line(LineConfig(places=2, waiting_max=1, wait_s=0.01))
        caller = Caller(name="a", at_once=3)
        async with line.place(caller, 2):
            waiting = asyncio.create_task(take(line, caller))
            await asyncio.sleep(0)
            with pytest.raises(ApiError, match="at once") as busy:
                await take(line, caller)
            assert busy.value.status == 429
            with pytest.raises(ApiError, match="wait already") as full:
                await take(line, Caller(name="b"))
            assert full.value.status == 503
            with pytest.raises(ApiError, match="no place") as late:
                await waiting
            assert late.value.status == 503
        with pytest.raises(ApiError) as many:
            await take(line, ANYBODY, 3)
        assert many.value.status == 400
        assert (line.num_running, line.num_waiting) == (0, 0)

    asyncio.run(run())


async def take(line: Line, caller: Caller, places: int = 1) -> None:
    async with line.place(caller, places):
        pass


def test_who_leaves_the_line_holds_nobody_up() -> None:
    async def run() -> None:
        line = Line(LineConfig(places=2))
        async with line.place(ANYBODY):
            wide = asyncio.create_task(take(line, Caller(name="a"), 2))
            small = asyncio.create_task(take(line, Caller(name="b")))
            await asyncio.sleep(0)
            assert line.num_waiting == 2
            wide.cancel()
            await small
            await asyncio.gather(wide, return_exceptions=True)
            assert (line.num_running, line.num_waiting) == (1, 0)

    asyncio.run(run())


class Resting:
    """A session that knows whether it was closed."""

    def __init__(self, number: int) -> None:
        self.id = SessionId(bytes([number]) * 32)
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def kept(number: int, tokens: range, owner: str = "a", at_s: float = 0.0) -> Kept:
    return Kept(owner=owner, tokens=tuple(tokens), session=Resting(number), at_s=at_s)


def test_a_session_is_found_by_its_tokens() -> None:
    shelf = KeptSessions(KeptConfig(tokens_max=1000))
    shelf.put(kept(1, range(50)))
    shelf.put(kept(2, range(1, 60)))
    assert shelf.find("b", list(range(50)), 0.0) is None
    assert shelf.find("a", list(range(100, 200)), 0.0) is None
    match = shelf.find("a", [*range(50), 7, 8], 0.0)
    assert match is not None
    assert (match.kept.session.id[0], match.length, match.is_fork) == (1, 50, False)
    assert shelf.find("a", [*range(50), 7, 8], 0.0) is None, "it was taken"
    again = shelf.find("a", list(range(1, 60)), 0.0)
    assert again is not None
    assert again.length == 58, "a token is left that asks for a row"


def test_a_part_is_forked() -> None:
    shelf = KeptSessions(KeptConfig(tokens_max=1000))
    shelf.put(kept(1, range(500)))
    assert shelf.find("a", [*range(30), 999, 999], 0.0) is None, "too short for a fork"
    for _ in range(2):
        match = shelf.find("a", [*range(100), 999, 999], 0.0)
        assert match is not None
        assert (match.length, match.is_fork) == (100, True)


def test_what_is_kept_is_bounded() -> None:
    shelf = KeptSessions(KeptConfig(tokens_max=100, sessions_max=2, ttl_s=10.0))
    all_of_them = [kept(number, range(40), at_s=float(number)) for number in range(4)]
    for one in all_of_them[:3]:
        shelf.put(one)
    assert [one.session.is_closed for one in all_of_them[:3]] == [True, False, False]
    shelf.put(kept(9, range(101)))
    assert (shelf.num_sessions, shelf.num_tokens) == (2, 80)
    shelf.expire(11.5)
    assert [one.session.is_closed for one in all_of_them[:3]] == [True, True, False]
    shelf.clear()
    assert all_of_them[2].session.is_closed
    assert shelf.num_sessions == 0
