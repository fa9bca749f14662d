"""What `shoal status` shows of a swarm: lines for a pipe, parts for a terminal."""

import pytest

from shoal.base.ids import PeerId, peer_text
from shoal.cli.status import Seen, as_dicts, renderables
from shoal.cli.watching import lines
from shoal.discovery.records import Record
from shoal.wire.fields import Coordinate


def server(start, end, error=""):
    is_seen = not error
    return {
        "peer": "abcdefghij",
        "blocks": [start, end],
        "state": "online",
        "numerics": "float32",
        "head": "",
        "adapters": {},
        "cache_tokens": 100,
        "free_tokens": 60 if is_seen else None,
        "sessions": 2 if is_seen else None,
        "queued_tokens": 3 if is_seen else None,
        "rtt_s": 0.001 if is_seen else None,
        "error": error,
    }


def model(*servers, missing=()):
    return {
        "model": "0123456789abcdef",
        "num_blocks": 12,
        "missing": [list(span) for span in missing],
        "servers": list(servers),
    }


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ([], ["no servers"]),
        (
            [model(server(0, 6), server(4, 12))],
            [
                "model 0123456789ab blocks 12 of 12 servers 2 of 2 sessions 4 queued 6 "
                "cache free 120 of 200"
            ],
        ),
        (
            [model(server(0, 6), server(6, 12, error="no answer"), missing=[(6, 12)])],
            [
                "model 0123456789ab blocks 6 of 12 servers 1 of 2 sessions 2 queued 3 "
                "cache free 60 of 100"
            ],
        ),
    ],
)
def test_a_line_per_model(models, said):
    assert lines(models) == said


def test_parts_name_what_is_missing():
    table, missing = renderables([model(server(0, 6), missing=[(6, 12)])])
    assert table.row_count == 1
    assert str(missing) == "missing: blocks [6,12)"
    assert str(renderables([model(server(0, 12))])[-1]) == "all 12 blocks are served"
    assert [str(part) for part in renderables([])] == ["no servers"]


def test_round_trips_between_servers_are_estimated_where_coordinates_tell():
    places = [(0.0, 0.1), (0.03, 0.1), None, (0.01, 0.1), (0.5, 9.0), (0.2, 0.1)]
    peers = [PeerId(bytes([number]) * 32) for number in range(len(places))]
    seen = [
        Seen(
            record=Record(
                peer=peer, swarm="s", boot_ms=1, counter=1, ttl_s=60.0, state="online",
                addresses=[], model="m", num_blocks=4, hidden_size=8, start=0, end=4,
                coordinate=place and Coordinate([place[0], 0.0, 0.0], 0.001, place[1]),
            ),
            error="no answer",
        )
        for peer, place in zip(peers, places, strict=True)
    ]  # fmt: skip
    (model,) = as_dicts(seen)
    first, _, unknown, *_, vague, _ = model["servers"]
    assert [one["peer"] for one in first["nearest"]] == [peer_text(peers[at]) for at in (3, 1, 5)]
    assert first["nearest"][0]["rtt_s"] == pytest.approx(0.012)
    assert first["coordinate"] == {"point_s": [0.0] * 3, "height_s": 0.001, "error": 0.1}
    assert unknown["coordinate"] is None
    assert unknown["nearest"] == vague["nearest"] == []
