"""A server under attack goes on serving others, and is as small as before."""

import asyncio
import threading
from pathlib import Path

import pytest

from shoal.net.address import parse_address
from tests.e2e.fuzzing import Fuzzer, facts_of
from tests.e2e.processes import alone, generate

pytestmark = pytest.mark.e2e

SECONDS = 20.0
GROWTH_BYTES_MAX = 300 << 20
"""Caches of 4096 hostile sessions and allocators that keep what they got."""

PROMPT = "What the sea gives, the sea takes."


def resident_bytes(pid):
    """Memory in use, as Linux counts it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))


def check_answer(model, server, ids):
    answer = generate(model, server.address, PROMPT, "--max-new-tokens", "20")
    assert answer["token_ids"] == ids


def test_a_server_under_attack_serves_others(model, serve):
    (server,) = serve(model, ("0:7",))
    ids, _ = alone(model, PROMPT, 20)
    facts = facts_of(server.address)
    before = resident_bytes(server.process.pid)
    fuzzer = Fuzzer(parse_address(server.address), seed=1, facts=facts)
    attack = threading.Thread(target=lambda: asyncio.run(fuzzer.run(SECONDS)))
    attack.start()
    answers = 0
    while attack.is_alive():
        check_answer(model, server, ids)
        answers += 1
    attack.join()
    assert answers
    assert min(fuzzer.done[move] for move in ("raw_bytes", "no_hello", "talk", "session")) > 5
    assert server.process.poll() is None
    check_answer(model, server, ids)
    assert resident_bytes(server.process.pid) - before < GROWTH_BYTES_MAX
    assert not [line for line in server.err if "engine broke" in line]
