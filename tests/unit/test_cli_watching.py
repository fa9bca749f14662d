"""What `shoal status` shows of a swarm: lines for a pipe, parts for a terminal."""

import pytest

from shoal.cli.status import renderables
from shoal.cli.watching import lines


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
