"""A server that goes to other blocks while it serves, in real processes."""

import json
import re
import signal

import pytest

from tests.e2e.processes import Process, Server, alone, end_all, servers, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROMPT = "What the sea gives, the sea takes."
LONG = "400"


@pytest.mark.timeout(240)
def test_a_server_goes_where_a_hole_is_and_the_answer_goes_on(model):
    """A session that it serves itself keeps the old blocks until its owner has others."""
    token_ids, _ = alone(model, PROMPT, int(LONG))
    first = Server(model, "0:3")
    join = first.ready().address
    mover = Process(
        "serve", str(model), "--threads", "1", "--num-blocks", "4", "--rebalance", "0.5",
        "--join", join,
    )  # fmt: skip
    mover.wait_line(mover.err, "announcing state=joining")  # its place is chosen
    second = Server(model, "3:7", join=join)
    assert mover.wait_line(mover.out, "ready ").endswith("blocks=[3,7)\n")
    second.ready()
    command = ("generate", str(model), "--join", join, "--prompt", PROMPT, "--json")
    client = Process(*command, "--max-new-tokens", LONG)
    try:
        wait_until(
            lambda: servers(join)[first.peer]["iterations"] > 5, "an answer in progress", 60.0
        )
        first.signal(signal.SIGKILL)
        moved = mover.wait_line(mover.out, "moved ")
        assert moved.endswith("blocks=[0,4)\n")
        assert client.wait(60) == 0, client.report()
        answer = json.loads(client.out[-1])
        assert answer["token_ids"] == token_ids
        chain = [(hop["peer"], hop["blocks"]) for hop in answer["chain"]]
        peer = re.search(r"peer=(\S+)", moved)[1]
        assert [one for one, _ in chain] == [peer, second.peer]
        mover.wait_line(mover.err, "old blocks dropped")
        assert not any("Traceback" in line for line in mover.err)
    finally:
        end_all([client, first, mover, second])
