"""Real servers that learn of each other by gossip, and over the local network."""

import asyncio
import json
import shutil
import signal
import subprocess
import time

import pytest

from shoal.base.ids import parse_peer
from shoal.cli.joining import SwarmChoice, visit
from tests.e2e.processes import ENVIRONMENT, SHOAL, servers, wait_until

pytestmark = pytest.mark.e2e

GONE_WITHIN_S = 30.0
"""A killed server; under 10 s on an idle machine, but tests share theirs."""

LAN_SCENE = """
set -e
ip link set lo up
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
for span in 0:4 4:7; do
    "$SHOAL" serve "$MODEL" --blocks $span --lan --listen tcp://127.0.0.1:400${span%%:*} \
        > "$OUT/$span" 2> "$OUT/$span.err" &
done
until grep -q ready "$OUT/0:4" && grep -q ready "$OUT/4:7"; do
    kill -0 %1
    kill -0 %2
    sleep 0.2
done
"$SHOAL" status --lan --json
"$SHOAL" status --lan --swarm strangers 2> "$OUT/strangers" || true
"""


def test_servers_in_a_line_know_each_other_and_notice_a_death(model, serve):
    (first,) = serve(model, ["0:3"])
    (second,) = serve(model, ["3:7"], join=first.address)
    (third,) = serve(model, ["3:7"], join=second.address)
    everybody = {first.peer, second.peer, third.peer}
    for server in (first, second, third):
        wait_until(lambda join=server.address: set(servers(join)) == everybody, "all see all", 15.0)

    async def follow():
        """A client that reads from two sees the death without asking again."""
        choice = SwarmChoice.parse([first.address, second.address], None, None)
        async with visit(choice) as visitor:
            directory = visitor.directory
            while len(directory.gossiper.neighbours) < 2:
                await directory.changed(-1)
                await asyncio.sleep(0.05)
            third.signal(signal.SIGKILL)
            start_s = time.monotonic()
            dead = parse_peer(third.peer)
            snapshot = directory.snapshot()
            while snapshot.find(dead) and dead not in snapshot.suspects:
                async with asyncio.timeout(GONE_WITHIN_S):
                    snapshot = await directory.changed(snapshot.version)
            return time.monotonic() - start_s

    suspected_s = asyncio.run(follow())
    print(f"a killed server was suspected after {suspected_s:.1f} s")
    for server in (first, second):
        wait_until(
            lambda join=server.address: set(servers(join)) == everybody - {third.peer},
            "the killed server is forgotten",
            GONE_WITHIN_S,
        )


def may_unshare():
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    command = ["unshare", "-rn", "ip", "link", "set", "lo", "up"]
    return subprocess.run(command, capture_output=True, timeout=10).returncode == 0


@pytest.mark.timeout(240)
def test_servers_find_each_other_in_the_local_network(model, tmp_path):
    """In a network of its own, so that nobody else hears the multicasts."""
    if not may_unshare():
        pytest.skip("no network namespaces here")
    result = subprocess.run(
        ["unshare", "-rn", "bash", "-c", LAN_SCENE],
        capture_output=True,
        text=True,
        timeout=180,
        env={**ENVIRONMENT, "SHOAL": SHOAL, "MODEL": str(model), "OUT": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr + (tmp_path / "0:4.err").read_text()
    (found,) = json.loads(result.stdout)["models"]
    assert [server["blocks"] for server in found["servers"]] == [[0, 4], [4, 7]]
    assert found["missing"] == []
    said = (tmp_path / "strangers").read_text()
    assert "no server of swarm 'strangers' answers in the local network" in said
