"""What is no request: the right status, nobody else affected, memory bounded."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from shoal.cli.gateway_web import LOOPBACK
from shoal.gateway import http
from shoal.gateway.keys import Caller, Keys, hash_of
from shoal.gateway.line import LineConfig
from shoal.gateway.opening import GatewayConfig
from tests.gateway_cases import Gate, gate

ALICE, BOB, CAROL = "a" * 20, "b" * 20, "c" * 20
SEA = [{"role": "user", "content": "The sea"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    keys = Keys(
        {
            hash_of(ALICE): Caller(name="alice"),
            hash_of(CAROL): Caller(name="carol", tokens_per_minute=10),
            hash_of(BOB): Caller(name="bob", at_once=1, requests_per_minute=3),
        }
    )
    config = GatewayConfig(
        names=("tiny",), keys=keys, hosts=LOOPBACK, line=LineConfig(places=4, waiting_max=2)
    )
    with gate(config, cache=tmp_path_factory.mktemp("cache"), borders=(0, 7)) as found:
        yield found


@pytest.fixture
def web(running: Gate) -> Iterator[httpx2.Client]:
    headers = {"Authorization": f"Bearer {ALICE}"}
    with httpx2.Client(base_url=running.url, headers=headers, timeout=30) as found:
        yield found


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": SEA, "max_tokens": 3, "temperature": 0, **fields}


LONG = "x" * 600
"""Over the context of 512."""


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("{", 400, "invalid_json"),
        ('{"metadata": ' + "[" * 50_000, 400, "invalid_json"),
        (chat(messages="x"), 400, "invalid_value"),
        (chat(temperature="hot"), 400, "invalid_value"),
        (chat(model="gpt-5"), 404, "model_not_found"),
        (chat(messages=[{"role": "user", "content": LONG}]), 400, "context_length_exceeded"),
        (chat(messages=[{"role": "user", "content": "x" * 900_000}]), 400,
         "context_length_exceeded"),
        (chat(max_tokens=500), 400, "context_length_exceeded"),
        (chat(messages=[{"role": "user", "content": "x" * (1 << 20)}]), 413, "body_too_large"),
        (chat(n=5), 400, None),
        (chat(logit_bias={"4000": 1}), 400, "bad_input"),
        (chat(response_format={"type": "json_schema",
                               "json_schema": {"schema": {"type": "nonsense"}}}),
         400, "invalid_schema"),
        (chat(response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}}),
         400, "invalid_schema"),
        (chat(response_format={"type": "json_schema", "json_schema": {
            "schema": {"type": "string", "pattern": "(" * 50}}}), 400, "invalid_schema"),
        (chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), 400, None),
        (chat(chat_template_kwargs={"x": [1]}), 400, None),
    ],
)  # fmt: skip
def test_chat_requests_that_can_not_be(
    web: httpx2.Client, body: Any, status: int, code: str | None
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = web.post("/v1/chat/completions", content=content)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert error["message"]
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "body",
    [{"prompt": []}, {"prompt": ""}, {"prompt": [4000]}, {"prompt": [-1]}, {"prompt": {"a": 1}},
     {"prompt": "x", "suffix": "y"}],
)  # fmt: skip
def test_completions_that_can_not_be(web: httpx2.Client, body: Any) -> None:
    assert web.post("/v1/completions", json=body).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/%2e%2e/%2e%2e/pyproject.toml", 404),
        ("POST", "/", 405),
    ],
)
def test_paths_that_are_none(web: httpx2.Client, method: str, path: str, status: int) -> None:
    answer = web.request(method, path)
    assert answer.status_code == status
    assert "message" in answer.json()["error"]


def test_keys_are_needed_and_counted(running: Gate) -> None:
    with httpx2.Client(base_url=running.url) as web:
        assert web.get("/health").json()["status"] == "ok"
        assert web.get("/").status_code == 200
        for path in ("/v1/models", "/metrics", "/swarm.json"):
            assert web.get(path).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        running.openai(api_key="wrong").models.list()
    bob = running.openai(api_key=BOB)
    asked: Any = {"model": "tiny", **chat()}
    for _ in range(3):
        bob.chat.completions.create(**asked)
    with pytest.raises(openai.RateLimitError, match="3 requests per minute"):
        bob.chat.completions.create(**asked)


def test_other_sites_may_not_ask(web: httpx2.Client) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"},
                    {"Origin": "null"}):  # fmt: skip
        assert web.get("/v1/models", headers=headers).status_code == 403
    own = str(web.base_url).rstrip("/")
    assert web.get("/v1/models", headers={"Origin": own}).status_code == 200


def test_a_request_keeps_its_number(web: httpx2.Client) -> None:
    answer = web.get("/health", headers={"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    strange = web.get("/health", headers={"X-Request-ID": "x" * 500})
    assert strange.headers["x-request-id"].startswith("req_")


def test_a_full_line_sends_away(running: Gate, web: httpx2.Client) -> None:
    with httpx2.Client(base_url=running.url, headers=web.headers, timeout=30) as other:
        wide = {**chat(n=4, stream=True, ignore_eos=True), "max_tokens": 400}
        with other.stream("POST", "/v1/chat/completions", json=wide) as answer:
            lines = answer.iter_lines()  # kept: without it the connection is closed
            next(lines)
            assert web.get("/health").json()["running"] == 4
            running.wait_until(lambda: running.client.num_sessions >= 4)
        running.wait_until(lambda: running.client.num_sessions <= 1)
    assert web.post("/v1/chat/completions", json=chat()).status_code == 200


def connected(running: Gate, sent: bytes) -> socket.socket:
    """A connection that takes hardly anything."""
    where = urlsplit(running.url)
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    made.connect((where.hostname, where.port))
    made.sendall(sent)
    return made


def request(body: dict[str, Any], length: int | None = None) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        + f"Authorization: Bearer {ALICE}\r\nContent-Length: {length or len(data)}\r\n\r\n".encode()
        + data
    )


def test_a_slow_reader_holds_nobody_up_and_is_let_go(
    running: Gate, web: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "WRITE_S", 1.0)
    before = running.on_loop(lambda: running.client.num_sessions)
    # Each token with 20 alternatives is some kilobytes: more than the buffers between take.
    others = [{"role": "user", "content": "Slowly, please"}]  # no session at rest begins so
    greedy = chat(
        messages=others, stream=True, logprobs=True, top_logprobs=20, ignore_eos=True, n=2
    )
    slow = connected(running, request({**greedy, "max_tokens": 450}))
    running.wait_until(lambda: running.client.num_sessions > before + 1)
    assert web.post("/v1/chat/completions", json=chat()).status_code == 200
    running.wait_until(lambda: running.client.num_sessions <= before + 1)
    slow.close()


def test_a_body_that_never_ends(
    running: Gate, web: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.2)
    made = connected(running, request(chat(), length=5000))
    made.settimeout(10)
    assert made.recv(12) == b"HTTP/1.1 408"
    made.close()
    assert web.post("/v1/chat/completions", json=chat()).status_code == 200


def test_a_gateway_without_a_template(tmp_path: Path) -> None:
    with gate(cache=tmp_path, template=None, patience_s=0.2, borders=(0, 7)) as bare:
        client = bare.openai()
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="tiny", messages=SEA)  # type: ignore[arg-type]
        answer = client.completions.create(model="tiny", prompt="x", temperature=0)
        assert answer.choices[0].text == bare.alone("x", 16)
        # The swarm goes away: the answer says so.
        (peer,) = bare.swarm.peers
        bare.swarm.crash(peer)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="y", temperature=0)
        assert caught.value.status_code == 503


def test_who_leaves_before_the_end_has_used_its_tokens(running: Gate) -> None:
    client = running.openai(api_key=CAROL)
    stream = client.chat.completions.create(model="tiny", stream=True, **chat(max_tokens=400))
    next(iter(stream))
    stream.close()

    def ask() -> None:
        for _ in range(100):  # until it is noticed that it left
            client.chat.completions.create(model="tiny", **chat(max_tokens=1))

    with pytest.raises(openai.RateLimitError, match="tokens per minute"):
        ask()
