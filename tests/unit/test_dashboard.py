"""Events between two looks, an observer, and the page by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from shoal.base.errors import PeerUnreachable
from shoal.dashboard.app import application
from shoal.dashboard.events import Event, compare
from shoal.dashboard.observer import Observer, ObserverConfig, observing
from shoal.lab.clock import run_virtual


def server(peer: str, blocks: tuple[int, int] = (0, 4), **changes: Any) -> dict[str, Any]:
    return {
        "peer": peer, "blocks": list(blocks), "state": "online", "error": "", "iterations": 5,
        **changes,
    }  # fmt: skip


def model(*servers: dict[str, Any], missing: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    return {"model": "m", "num_blocks": 4, "servers": list(servers), "missing": list(missing)}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [], []),
        ([model(server("a"))], [model(server("a", iterations=9))], []),
        ([], [model(server("a"))], [("joined", "a")]),
        ([model(server("a"))], [], [("left", "a")]),
        ([model(server("a"))], [model(server("a"), server("b"))], [("joined", "b")]),
        ([model(server("a"))], [model(server("a", (2, 4)), missing=[[0, 2]])],
         [("moved", "a"), ("missing", "")]),
        ([model(server("a", state="joining"))], [model(server("a"))], [("state", "a")]),
        ([model(server("a"))], [model(server("a", error="no"), missing=[[0, 4]])],
         [("lost", "a"), ("missing", "")]),
        ([model(server("a", error="no"), missing=[(0, 4)])], [model(server("a"))],
         [("back", "a"), ("covered", "")]),
        ([model(missing=[[0, 4]])], [model(missing=[(0, 4)])], []),
    ],
)  # fmt: skip
def test_events_explain_the_difference(before, after, expected) -> None:
    assert [(event.kind, event.peer) for event in compare(before, after)] == expected


class Swarm:
    """What looks find, and how many there were."""

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = [model(server("a", iterations=0))]
        self.looks = 0
        self.is_lost = False

    async def look(self) -> list[dict[str, Any]]:
        self.looks += 1
        if self.is_lost:
            raise PeerUnreachable("nobody answers")
        return self.models


def test_an_observer_looks_seldom_unless_it_is_asked() -> None:
    async def run() -> None:
        swarm = Swarm()
        config = ObserverConfig(watched_s=1.0, alone_s=50.0, patience_s=5.0)
        async with observing(swarm.look, lambda: 1000.0, config) as observer:
            state = await observer.state()
            assert state["models"][0]["servers"][0]["iterations_per_s"] is None
            await asyncio.sleep(10)
            assert 5 <= swarm.looks <= 7, "it was watched for five seconds"
            swarm.models = [model(server("a", iterations=30), server("b"))]
            await observer.state()
            await asyncio.sleep(0.5)
            state = await observer.state()
            (first, second) = state["models"][0]["servers"]
            assert first["iterations_per_s"] > 0
            assert second["iterations_per_s"] is None, "it was seen once"
            assert [event["kind"] for event in state["events"]] == ["joined"]
            assert state["events"][0]["at_s"] == 1000.0

    run_virtual(run())


def test_a_look_that_fails_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        swarm = Swarm()
        async with observing(swarm.look, lambda: 0.0) as observer:
            await observer.state()
            swarm.is_lost = True
            await observer.state()
            await asyncio.sleep(5)
            swarm.is_lost = False
            swarm.models = []
            await asyncio.sleep(3)
            observer.note(Event(kind="repaired", text="x"))
            state = await observer.state()
            assert [event["kind"] for event in state["events"]] == ["repaired", "left"]

    run_virtual(run())
    assert "could not be looked at" in caplog.text


async def ask(app: Any, path: str, host: str = "localhost") -> tuple[int, dict[str, str], bytes]:
    sent: list[Any] = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "method": "GET", "path": path,
        "raw_path": path.encode(), "root_path": "", "query_string": b"", "http_version": "1.1",
        "scheme": "http", "headers": [(b"host", host.encode())], "server": ("localhost", 80),
        "client": ("127.0.0.1", 1), "extensions": {},
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()  # nothing more comes, and nobody leaves
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(one.get("body", b"") for one in sent[1:])


def test_the_page_by_itself() -> None:
    async def run() -> None:
        observer = Observer(Swarm().look, lambda: 0.0)
        await observer.look()
        app = application(observer, {"localhost"})
        status, _, body = await ask(app, "/swarm.json")
        assert status == 200
        assert b'"peer":"a"' in body
        status, headers, _ = await ask(app, "/")
        assert (status, headers["location"]) == (307, "/swarm")
        for path in ("/swarm", "/swarm-static/swarm.js", "/swarm-static/swarm.css"):
            assert (await ask(app, path))[0] == 200
        assert (await ask(app, "/swarm-static/../app.py"))[0] == 404
        assert (await ask(app, "/swarm.json", host="evil.example"))[0] == 400

    asyncio.run(run())
