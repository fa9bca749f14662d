"""`--num-blocks`: the span that the swarm's records lead to."""

import asyncio
import random

import pytest

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.cli.joining import SwarmChoice
from shoal.cli.models import OpenModel
from shoal.cli.placing import choose_blocks, find_place
from shoal.plan.view import ServerView, SwarmView

BLOCKS = 12


def server(start, end, state="online", prefill_s=0.01):
    return ServerView(
        peer=PeerId(bytes([start]) * 32),
        addresses=(),
        span=Span(start, end),
        state=state,
        prefill_s_per_block_token=prefill_s,
    )


def view(*servers):
    return SwarmView(model="m", num_blocks=BLOCKS, hidden_size=8, servers=servers)


@pytest.mark.parametrize(
    ("servers", "wanted", "span"),
    [
        ([], 4, (0, 4)),
        ([], 12, (0, 12)),
        ([server(0, 6)], 6, (6, 12)),
        ([server(0, 6)], 4, (6, 10)),
        ([server(0, 6, "joining", 0.0)], 6, (6, 12)),
        ([server(0, 6, "draining")], 6, (0, 6)),
        ([server(0, 4), server(8, 12)], 4, (4, 8)),
        # Everything is served: help the slower half.
        ([server(0, 6, prefill_s=0.01), server(6, 12, prefill_s=0.04)], 6, (6, 12)),
        # Who has not measured counts like the others, not like nothing.
        ([server(0, 4, prefill_s=0.01), server(4, 8, "joining", 0.0)], 4, (8, 12)),
    ],
)
def test_goes_where_the_swarm_serves_least(servers, wanted, span):
    assert choose_blocks(view(*servers), BLOCKS, wanted) == Span(*span)


@pytest.mark.parametrize("wanted", [0, 13])
def test_asks_for_as_many_as_there_are(wanted):
    with pytest.raises(ConfigError, match="12 blocks; ask for 1 to 12"):
        choose_blocks(view(), BLOCKS, wanted)


def test_without_a_swarm_it_starts_at_the_first_block():
    model = OpenModel(given="m", source=None, name="m", num_blocks=BLOCKS, hidden_size=8)
    swarm = SwarmChoice.parse([], None, None)
    assert asyncio.run(find_place(swarm, model, 5, random.Random(1))) == Span(0, 5)
