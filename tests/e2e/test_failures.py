"""Servers that die, fill up, stop, or were never there."""

import asyncio
import json
import random
import signal
import time

import pytest

from shoal.base.errors import VersionMismatch
from shoal.base.ids import peer_text
from shoal.cli.joining import SwarmChoice, visit
from shoal.client.client import open_client
from shoal.client.config import ClientConfig
from shoal.net.address import parse_address
from shoal.net.channel import PURPOSE_CONTROL
from shoal.net.identity import Identity
from shoal.net.tcp import TcpTransport
from shoal.wire.messages import Error, Hello, decode, encode
from tests.e2e.processes import (
    Process,
    Server,
    alone,
    error_line,
    run,
    servers,
    wait_until,
)

pytestmark = pytest.mark.e2e

PROMPT = "What the sea gives, the sea takes."
LONG = "400"
DEAD = f"tcp://{peer_text(Identity.from_seed(bytes(32)).peer)}@127.0.0.1:1"
CACHE_TOKENS = 512


@pytest.fixture(scope="module")
def swarm(model, serve):
    """Four servers; the two in the middle hold the same blocks."""
    return serve(
        model,
        ("0:2", "2:5", "2:5", "5:7"),
        "--cache-tokens",
        str(CACHE_TOKENS),
        "--cache-share",
        "1",
    )


def test_full_servers_say_when_to_come_back(model, swarm):
    """A session of another client holds all of the cache of both servers of the middle."""

    async def hold_and_ask():
        async with visit(SwarmChoice.parse([swarm[0].address], None, None)) as visitor:
            record = visitor.directory.snapshot().records[0].record
            config = ClientConfig(
                model=record.model, num_blocks=record.num_blocks, hidden_size=record.hidden_size
            )
            async with (
                open_client(
                    visitor.identity,
                    visitor.transport,
                    visitor.swarm_pass,
                    visitor.directory,
                    config,
                    rng=random.Random(1),
                    wall_clock=time.time,  # noqa: TID251
                ) as client,
                await client.open_session("float32") as session,
            ):
                rows = bytes(CACHE_TOKENS * record.hidden_size * 4)
                await session.step(rows, CACHE_TOKENS)
                return await asyncio.to_thread(
                    run, "generate", str(model), "--join", swarm[0].address, "--prompt", "x",
                    "--patience", "1",
                )  # fmt: skip

    result = asyncio.run(hold_and_ask())
    assert result.returncode == 1
    line = error_line(result.stderr)
    assert "cache is in use" in line
    assert "try again in 2 s" in line


def test_too_long_a_prompt_says_so(model, swarm):
    prompt = "x" * (CACHE_TOKENS + 1)
    result = run("generate", str(model), "--join", swarm[0].address, "--prompt", prompt)
    assert result.returncode == 1
    assert str(CACHE_TOKENS) in error_line(result.stderr)


def test_another_version_is_refused_with_the_fix(swarm):
    async def greet():
        transport = TcpTransport(Identity.generate())
        stream = await transport.dial(parse_address(swarm[0].address))
        await stream.send(encode(Hello(99, "default", PURPOSE_CONTROL, b"", "x")))
        answer = decode((await stream.receive()).header)
        await transport.close()
        return answer

    answer = asyncio.run(greet())
    assert isinstance(answer, Error)
    assert answer.code == VersionMismatch.code
    assert "upgrade the older side" in answer.detail


def test_a_killed_server_does_not_change_the_answer(model, swarm):
    join = swarm[0].address
    token_ids, text = alone(model, PROMPT, int(LONG))
    before = {peer: server["iterations"] for peer, server in servers(join).items()}
    command = ("generate", str(model), "--join", join, "--prompt", PROMPT, "--json")
    client = Process(*command, "--max-new-tokens", LONG)
    victims = []

    def is_running():
        now = servers(join)
        victims[:] = [
            one for one in swarm[1:3] if now[one.peer]["iterations"] > before[one.peer] + 5
        ]
        return bool(victims)

    wait_until(is_running, "an answer in progress")
    victims[0].signal(signal.SIGKILL)
    assert client.wait(60) == 0, client.report()
    answer = json.loads(client.out[-1])
    client.end()
    spare = next(one for one in swarm[1:3] if one is not victims[0])
    assert answer["token_ids"] == token_ids
    assert answer["text"] == text
    (recovery,) = answer["recoveries"]
    assert recovery["lost"] == [victims[0].peer]
    assert recovery["replacement"] == [spare.peer]
    assert recovery["replayed_tokens"] >= len(PROMPT)
    assert recovery["pause_s"] > 0
    assert answer["chain"][1] == {"peer": spare.peer, "blocks": [2, 5]}
    assert answer["numerics"] in ("exact", "same-class")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_says_good_bye(model, swarm, number):
    leaver = Server(model, "0:1", join=swarm[0].address).ready()
    assert leaver.peer in servers(swarm[0].address)
    leaver.signal(number)
    assert leaver.wait() == 0, leaver.report()
    leaver.end()
    assert leaver.err[-1] == "stopped\n"
    assert not any("Traceback" in line for line in leaver.err)
    assert leaver.peer not in servers(swarm[0].address)


def test_a_server_can_be_stopped_while_it_loads(model, swarm):
    loader = Server(model, "0:7", join=swarm[0].address)
    loader.wait_line(loader.err, "announcing state=joining")
    loader.signal(signal.SIGINT)
    assert loader.wait() == 0, loader.report()
    loader.end()
    assert not any("Traceback" in line for line in loader.err)
    assert loader.out == []


def test_missing_blocks_are_named(model, serve):
    (lonely,) = serve(model, ["2:5"])
    command = ("generate", str(model), "--join", lonely.address, "--prompt", "x")
    result = run(*command, "--patience", "4")
    assert result.returncode == 1
    assert "s left: no server for blocks [0,2), [5,7)" in result.stderr
    line = error_line(result.stderr)
    assert "holds blocks [0,2) and [5,7)" in line
    assert "--blocks 0:2" in line
    status = run("status", "--join", lonely.address)
    assert "missing: blocks [0,2)" in status.stdout
    assert "missing: blocks [5,7)" in status.stdout


def test_joining_the_dead_is_an_error(model):
    result = run("serve", str(model), "--join", DEAD)
    assert result.returncode == 1
    assert DEAD in error_line(result.stderr)
    assert result.stdout == ""


def test_an_unknown_model_is_yours_to_fix(swarm):
    result = run("generate", "nosuch", "--join", swarm[0].address, "--prompt", "x")
    assert result.returncode == 2
    assert "no model 'nosuch'" in error_line(result.stderr)
    assert result.stdout == ""
