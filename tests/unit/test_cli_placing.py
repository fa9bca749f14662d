"""`--num-blocks`: the span that the swarm's records lead to."""

import asyncio
import random

import pytest

from shoal.base.errors import ConfigError
from shoal.base.ids import PeerId
from shoal.base.spans import Span
from shoal.cli.joining import SwarmChoice
from shoal.cli.models import OpenModel
from shoal.cli.placing import DEFAULT_POLICY, choose_blocks, find_place, parse_place
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
    assert choose_blocks("petals", view(*servers), wanted, 64) == Span(*span)


@pytest.mark.parametrize("wanted", [0, 13])
def test_asks_for_as_many_as_there_are(wanted):
    with pytest.raises(ConfigError, match="12 blocks; ask for 1 to 12"):
        choose_blocks("petals", view(), wanted, 64)


@pytest.mark.parametrize("policy", ["petals", "latency"])
def test_without_a_swarm_it_starts_at_the_first_block(policy):
    model = OpenModel(given="m", source=None, name="m", num_blocks=BLOCKS, hidden_size=8)
    swarm = SwarmChoice.parse([], None, None)
    assert asyncio.run(find_place(swarm, model, policy, 5, 64, random.Random(1))) == Span(0, 5)


@pytest.mark.parametrize(
    ("placement", "num_blocks", "policy", "period_s"),
    [
        (None, 4, DEFAULT_POLICY, 60.0),
        ("petals", 4, "petals", 60.0),
        ("latency", 4, "latency", 60.0),
        ("fixed", 4, DEFAULT_POLICY, 0.0),
    ],
)
def test_a_number_of_blocks_leaves_the_place_to_a_rule(placement, num_blocks, policy, period_s):
    choice = parse_place(placement, 60.0, has_span=False, num_blocks=num_blocks)
    assert (choice.policy, choice.period_s) == (policy, period_s)


@pytest.mark.parametrize(
    ("placement", "period_s", "has_span", "num_blocks", "match"),
    [
        ("best", 60.0, False, 4, "write fixed, petals, latency"),
        ("petals", 60.0, True, None, "--num-blocks N instead of --blocks"),
        ("petals", 60.0, False, None, "say how many with --num-blocks N$"),
        (None, -1.0, False, 4, "--rebalance -1"),
        (None, float("nan"), False, 4, "--rebalance nan"),
        (None, 60.0, True, 4, "give one"),
    ],
)
def test_options_that_say_nothing_are_refused(placement, period_s, has_span, num_blocks, match):
    with pytest.raises(ConfigError, match=match):
        parse_place(placement, period_s, has_span=has_span, num_blocks=num_blocks)


@pytest.mark.parametrize("placement", [None, "fixed"])
@pytest.mark.parametrize("has_span", [True, False])
def test_blocks_that_are_given_are_fixed(placement, has_span):
    assert parse_place(placement, 60.0, has_span=has_span, num_blocks=None) is None
